"""Categories of nouns: which of them questions name, and where people disagree."""

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
