"""What each command does. Imported when a command runs; see cli.py for the command line itself."""

from blip2.commands.checkpoints import bench, convert, doctor, inspect, models, quantize
from blip2.commands.images import ask, caption, chat, embed, explain, match
from blip2.commands.server import serve
from blip2.commands.sets import evaluate
from blip2.commands.terminal import DONE, NOTHING_DONE, complain

__all__ = ["COMMANDS", "DONE", "NOTHING_DONE", "complain"]

COMMANDS = {
    "caption": caption,
    "ask": ask,
    "chat": chat,
    "match": match,
    "embed": embed,
    "eval": evaluate,
    "explain": explain,
    "serve": serve,
    "inspect": inspect,
    "convert": convert,
    "quantize": quantize,
    "bench": bench,
    "models": models,
    "doctor": doctor,
}
