"""How the composer's nouns are related: categories, and names that may both be true."""

from __future__ import annotations

ANIMALS = ("animal", "bird", "insect", "fish")
# Categories that questions name: "what fruit is this?"
ASKABLE = (
    "animal", "bird", "insect", "fruit", "vegetable", "vehicle", "tool", "musical instrument", "piece of clothing",
    "flower", "building", "shape",
)  # fmt: skip
# Words that may be true of the same object: none is used in a question about an absent object if another is present.
OVERLAPS = (
    {"boat", "sailboat", "ship", "submarine"},
    {"circle", "oval"},
    {"square", "rectangle", "diamond"},
    {"chicken", "rooster", "chick", "roast turkey", "turkey"},
    {"cup", "drinking glass", "wine glass", "kettle", "teapot", "pitcher", "bottle"},
    {"sheep", "lamb", "ram"},
    {"bull", "cow", "bison", "yak", "gnu"},
    {"house", "cabin", "barn", "castle", "fort", "tower", "church", "igloo"},
    {"tent", "tepee", "circus tent"},
    {"monitor", "television", "laptop"},
    {"bow", "bow tie"},
    {"shirt", "t-shirt", "jacket"},
    {"jeans", "pants"},
    {"moon", "planet"},
    {"egg", "easter egg"},
    {"santa claus", "santa hat", "elf hat"},
    {"leaf", "holly", "clover"},
    {
        "man",
        "doctor",
        "nurse",
        "scientist",
        "police officer",
        "firefighter",
        "astronaut",
        "dancer",
        "mermaid",
    },
    {"train", "train car"},
    {"parachute", "hot air balloon", "balloon"},
    {"airplane", "fighter jet"},
    {"guitar", "violin", "cello"},
    {"mouse", "rat", "hamster"},
    {"chimpanzee", "monkey", "gorilla"},
    {"clock", "watch", "stopwatch"},
    {"snail", "slug", "shell"},
    {"crow", "blackbird", "magpie", "lark", "swallow"},
    {"cheetah", "tiger", "lion", "cat"},
    {"deer", "reindeer", "antelope"},
    {"potted plant", "palm tree", "cactus"},
    {"cement mixer", "cement truck"},
    {"dog", "wolf", "fox"},
    {"bee", "wasp", "fly"},
    {"butterfly", "moth"},
    {"handbag", "suitcase", "backpack"},
    {"bicycle", "tricycle", "motorcycle", "scooter"},
    {"donkey", "horse"},
    {"orange", "apricot", "peach", "lemon", "lime", "mango"},
    {"plum", "cherry"},
    {"sword", "knife"},
    {"pen", "pencil", "marker"},
)
