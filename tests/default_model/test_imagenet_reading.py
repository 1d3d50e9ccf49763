from __future__ import annotations

from pathlib import Path

import pytest

from default_model.imagenet import ImageNetClass, read_imagenet
from default_model.language import language_of

HEAD = "index,wnid,name,noun,plural,article,category,breed\n"
ROWS = '0,n02088364,beagle,dog,dogs,a,animal,beagle\n1,n02113799,"poodle, toy",dog,dogs,a,animal,poodle\n'


def test_classes_become_nouns_with_breeds(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(HEAD + ROWS + "2,n04380533,table lamp,lamp,lamps,a,household item,\n")
    classes = read_imagenet(tmp_path / "table.csv")
    assert classes[1] == ImageNetClass(1, "n02113799", "poodle, toy", "dog", "dogs", "a", "animal", "poodle")
    language = language_of([], classes)
    assert language.breeds == {"dog": ("beagle", "poodle")}
    assert language.one("lamp") == "a lamp" and language.nouns["dog"].category == "animal"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("index,noun\n", "has the columns"),
        (HEAD + "1,n02088364,beagle,dog,dogs,a,animal,beagle\n", "line 2: index '1', but 0 comes next"),
        (HEAD + "0,beagle,beagle,dog,dogs,a,animal,beagle\n", "line 2: 'beagle' is no WordNet id"),
        (HEAD + "0,n02088364,beagle,Dog,dogs,a,animal,beagle\n", "noun 'Dog' must be a lower-case word"),
        (HEAD + "0,n02088364,beagle,dog,,a,animal,beagle\n", "plural '' must be"),
        (HEAD + "0,n02088364,beagle,dog\n", "must have 8 values"),
        (HEAD + "0,n02088364,beagle,dog,dogs,a,animal,beagle,more\n", "must have 8 values"),
    ],
)
def test_tables_with_mistakes(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_imagenet(tmp_path / "table.csv")
