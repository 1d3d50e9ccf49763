"""How the composer's nouns are related: categories, and names that may both be true."""

from __future__ import annotations

ANIMALS = ("animal", "bird", "insect", "fish")
# Categories that questions name: "what fruit is this?"
ASKABLE = (
    "animal", "bird", "insect", "fish", "fruit", "vegetable", "food", "drink", "vehicle", "tool", "musical instrument",
    "piece of clothing", "flower", "building", "weapon", "shape",
)  # fmt: skip
CATEGORY_PLURALS = {"fish": "fish", "food": "foods", "piece of clothing": "pieces of clothing"}
UNIT_PLURALS = {"loaf": "loaves", "bunch": "bunches", "box": "boxes", "glass": "glasses"}
# Of things in these categories people disagree whether they are of the first one: questions leave them out.
UNCLEAR = {
    "animal": {"toy", "food", "holiday item", "person", "thing in nature", "body part"},
    "bird": {"toy", "food"},
    "insect": {"animal"},
    "fish": {"animal", "food"},
    "fruit": {"vegetable", "food", "plant", "drink", "holiday item"},
    "vegetable": {"fruit", "food", "plant", "holiday item"},
    "food": {"fruit", "vegetable", "plant", "drink", "animal", "fish", "bird", "holiday item"},
    "drink": {"food", "household item", "fruit"},
    "vehicle": {
        "vehicle part", "machine", "toy", "thing in space",
        "sports item", "weapon", "household item", "thing in town",
    },
    "tool": {
        "household item", "machine", "weapon", "electronic device",
        "medical item", "sports item", "vehicle", "musical instrument",
    },
    "musical instrument": {"toy", "household item", "thing in town"},
    "piece of clothing": {
        "household item", "sports item", "body part",
        "holiday item", "medical item", "weapon", "electronic device",
    },
    "flower": {"plant", "thing in nature", "holiday item"},
    "building": {
        "thing in town", "place", "household item",
        "thing in nature", "vehicle", "holiday item", "machine",
    },
    "weapon": {"tool", "household item", "sports item", "vehicle", "thing in space", "vehicle part", "toy"},
}  # fmt: skip
# What a photograph of one thing hardly shows too, by where it may be taken; but nothing of the thing's own family, and
# nothing that is everywhere.
RARELY_BESIDE = {
    "outdoors": ("musical instrument", "weapon"),
    "animal": ("fruit", "vegetable", "food", "vehicle", "musical instrument", "weapon"),
    "food": ("animal", "vehicle", "musical instrument"),
    "other": ("animal", "bird", "insect", "fish", "vehicle", "musical instrument", "weapon"),
}
FAMILIES = (
    ANIMALS,
    ("fruit", "vegetable", "food", "drink", "plant", "flower"),
    ("vehicle", "vehicle part", "weapon"),
)
OUTDOORS = (
    "place", "thing in nature", "thing in town", "plant", "flower", "person", "building", "road sign", "sports item",
    "vehicle",
)  # fmt: skip
COMMONPLACE = {
    "dog", "cat", "horse", "bird", "fish", "fly", "car", "truck", "bicycle", "boat", "bread", "knife", "cow", "pig",
    "rabbit",    "sheep", "lamb", "crab", "lobster", "shrimp", "snail", "octopus", "egg",
}  # fmt: skip
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
