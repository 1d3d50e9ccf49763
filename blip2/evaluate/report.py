"""A report for people and machines: a table, JSON, predictions in the benchmarks' forms, a page to look through."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2.evaluate.run import Outcome, Report
from blip2.evaluate.tasks import ImageFile
from blip2.imagefiles.listing import ImageItem
from blip2.images import ImageError, load_image
from blip2.storage import encode_text, replace_file

SHOWN = 500  # the worst items, on the page
NAMED = 10  # damaged images and rows left out, in JSON
_THUMBNAIL = 256  # px


def lines(report: Report) -> Iterator[str]:
    """The table, a line a figure: its name, ours, the published one."""
    yield f"{report.task}: {report.model}, {len(report.outcomes)} items, protocol {report.protocol.name}"
    for name in report.metrics | report.published:
        ours = figure(name, report.metrics[name]) if name in report.metrics else ""
        theirs = f"   published {figure(name, report.published[name])}" if name in report.published else ""
        yield f"{name:48} {ours:>8}{theirs}"
    for note in report.notes:
        yield f"note: {note}"


def figure(name: str, value: float | None) -> str:
    """CIDEr as it is, every other figure in percent."""
    if value is None:
        return "not defined"
    return f"{value:.3f}" if "CIDEr" in name else f"{value:.1%}"


def report_summary(report: Report) -> dict[str, Any]:
    """The report without its outcomes.

    Of damaged images and of rows left out it has how many there are, and the first.
    """
    parts = {name: value for name, value in vars(report).items() if name != "outcomes"}
    parts |= {"damaged": len(report.damaged), "first_damaged": list(report.damaged[:NAMED])}
    parts |= {"left_out": len(report.left_out), "first_left_out": list(report.left_out[:NAMED])}
    return parts | {"items": len(report.outcomes), "protocol": asdict(report.protocol)}


def predictions(report: Report) -> list[dict[str, Any]]:
    """The texts, in the form that the task's own evaluation takes: COCO's, VQA's or GQA's results."""
    if report.task == "gqa":
        return [{"questionId": o.item.id, "prediction": o.text} for o in report.outcomes]
    return [
        {"question_id": o.item.id, "answer": o.text}
        if o.item.question
        else {"image_id": o.item.id, "caption": o.text}
        for o in report.outcomes
    ]


def write(report: Report, folder: Path) -> list[Path]:
    """Write results.json, predictions.json and index.html into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        {"id": o.item.id, "image": _image_name(o)}
        | {"text": o.text, "scores": o.scores}
        | ({"question": o.item.question} if o.item.question else {})
        | ({"names": o.item.names} if o.item.names else {})
        | ({"ranked": [asdict(answer) for answer in o.ranked]} if o.ranked else {})
        for o in report.outcomes
    ]
    texts = {
        "results.json": json.dumps(report_summary(report) | {"outcomes": items}, indent=1),
        "predictions.json": json.dumps(predictions(report)),
        "index.html": page(report),
    }
    for name, text in texts.items():
        with replace_file(folder / name) as beside:
            beside.write_bytes(encode_text(text))  # bytes of a file name that are no UTF-8 are written out
    return [folder / name for name in texts]


def _image_name(outcome: Outcome) -> str:
    image = outcome.item.image
    return image.name if isinstance(image, ImageItem) else str(image) if isinstance(image, ImageFile) else ""


_STYLE = """
body{font:15px/1.4 sans-serif;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse}
td,th{padding:.2em 1em .2em 0;text-align:left}article{display:flex;gap:1em;border-top:1px solid #ccc;padding:1em 0}
article img{width:16em;height:16em;object-fit:contain;background:#f4f4f4;flex:none}h2{font-size:1.1em;margin:0}
p{margin:.3em 0}.reference,.scores,.id{color:#555}.scores{font-family:monospace}
"""


def page(report: Report) -> str:
    """One HTML file that needs nothing else: the figures, then the items, worst first, with their pictures."""
    shown = sorted(report.outcomes, key=lambda outcome: outcome.quality)[:SHOWN]
    title = html.escape(f"{report.task}: {report.model}")
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{figure(name, value)}<td>"
        + (figure(name, report.published[name]) if name in report.published else "")
        for name, value in report.metrics.items()
    )
    head = "<tr><th>figure<th>ours<th>" + ("published" if report.published else "")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    about = f"{len(report.outcomes)} items, protocol {html.escape(report.protocol.name)}"
    worst = "" if len(shown) == len(report.outcomes) else f", the worst {len(shown)} shown"
    body = "\n".join(map(_article, shown))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{about}{worst}; worst first</p><table>{head}{rows}</table>{notes}\n{body}</html>\n"
    )


def _article(outcome: Outcome) -> str:
    item = outcome.item
    references = item.answers if item.question else item.captions or item.names
    parts = [f"<p>{html.escape(item.question)}</p>"] if item.question else []
    parts += [f"<h2>{html.escape(outcome.text) or '(no answer)'}</h2>"]
    parts += [
        f"<p class=reference>{html.escape(text)}{f' ({count})' if count > 1 else ''}</p>"
        for text, count in Counter(references).items()
    ]
    parts += [
        f"<p class=scores>{best.probability:.3f} {html.escape(best.answer)}</p>" for best in outcome.ranked
    ]
    scores = " ".join(
        f"{name} {'not defined' if value is None else f'{value:.3f}'}"
        for name, value in outcome.scores.items()
    )
    parts.append(f"<p class=scores>{html.escape(scores)}</p><p class=id>{html.escape(str(item.id))}</p>")
    return f"<article>{_picture(outcome)}<div>{''.join(parts)}</div></article>"


def _picture(outcome: Outcome) -> str:
    try:
        image = load_image(outcome.item.image)
    except ImageError as error:
        return f"<p>{html.escape(str(error))}</p>"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img loading=lazy alt="" src="data:image/jpeg;base64,{encoded}">'
