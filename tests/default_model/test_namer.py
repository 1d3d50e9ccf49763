"""The names the stem gives: prototypes that hold for another domain, codes, and what is kept of its maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from default_model.namer import (
    CODE,
    EVIDENCE_GAIN,
    Names,
    alike,
    class_means,
    evidence_matrix,
    fit_coarse,
    fit_fine,
    fit_prototypes,
    name_codes,
    patterns,
    profile,
    standard_names,
)

HEAD, CLASSES, NOUNS = 24, 8, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(shift: Tensor, seed: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Features [N, HEAD] around a middle for each noun, moved by `shift`, and the nouns."""
    labels = torch.arange(count) % NOUNS
    return 3 * normal(NOUNS, HEAD, seed=1)[labels] + normal(count, HEAD, seed=seed) / 2 + shift, labels


def named(heads: Tensor, prototypes: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The noun that `StemReadout` finds most likely."""
    found = torch.cat([profile(heads @ weight.mT + bias), heads], dim=1)
    return (found @ prototypes[0].mT + prototypes[1]).argmax(1)


def test_prototypes_of_cut_outs_name_photographs() -> None:
    weight, bias = normal(CLASSES, HEAD, seed=2) / 2, normal(CLASSES, seed=3)
    pictures, labels = clusters(torch.zeros(HEAD), seed=4)
    shift = 9 * normal(NOUNS, HEAD, seed=1)[0]  # photographs all look a little like the first noun
    photographs, truth = clusters(shift, seed=5)
    prototypes = fit_prototypes(pictures, labels, photographs, weight, bias)
    assert prototypes[0].shape == (NOUNS, CLASSES + HEAD)
    assert (named(photographs, prototypes, weight, bias) == truth).float().mean() > 0.95
    # Centred by the cut-outs themselves they name photographs by what the domains differ in.
    uncentred = fit_prototypes(pictures, labels, pictures, weight, bias)
    assert (named(pictures, uncentred, weight, bias) == labels).float().mean() > 0.95
    assert (named(photographs, uncentred, weight, bias) == truth).float().mean() < 0.5


def test_class_means() -> None:
    means = class_means(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1, 0, 1]))
    assert means.tolist() == [[3.0, 4.0], [3.0, 4.0]]


def test_coarse_channels_are_white_and_tell_nouns_apart() -> None:
    stretched = torch.linspace(0.1, 5, HEAD)
    pictures, labels = clusters(torch.ones(HEAD), seed=4, count=400)
    kept, bias = fit_coarse(pictures * stretched, labels, normal(CLASSES, HEAD, seed=2), channels=6)
    out = pictures * stretched @ kept.mT + bias
    torch.testing.assert_close(out.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(6), atol=1e-3, rtol=0)
    within = out - class_means(out, labels)[labels]
    assert within.var(0).mean() < 0.3  # most of it is between nouns


def test_fine_channels_are_principal_components() -> None:
    maps = normal(2000, 6, seed=0) * torch.tensor([4.0, 2.0, 1.0, 0.05, 0.05, 0.05]) + 3
    kept, bias = fit_fine(maps, channels=4)
    out = maps @ kept.mT + bias
    covariance = out.mT @ out / len(out)
    torch.testing.assert_close(covariance[:3, :3], torch.eye(3), atol=1e-2, rtol=0)
    assert covariance[3, 3] < 0.1  # noise is not enlarged


def test_codes_depend_on_the_noun_alone_and_resemble_those_of_its_category() -> None:
    categories = {"dog": "animal", "cat": "animal", "bus": "vehicle", "car": "vehicle"}
    codes, fewer = name_codes(categories), name_codes({"cat": "animal"})
    assert torch.equal(codes["cat"], fewer["cat"])
    assert all(abs(code.norm().item() - 1) < 1e-5 and code.shape == (CODE,) for code in codes.values())
    many = name_codes({f"{kind} {i}": kind for kind in ("animal", "vehicle") for i in range(40)})
    vectors = torch.stack(list(many.values()))
    likeness = vectors @ vectors.mT
    within = likeness[:40, :40][~torch.eye(40, dtype=torch.bool)].mean()
    assert 0.15 < within < 0.25  # 0.25 / 1.25
    assert likeness[:40, 40:].mean().abs() < 0.1


def test_the_evidence_of_one_name_alone_is_as_large_as_its_gain(names: Names) -> None:
    matrix = evidence_matrix(names, name_codes(dict.fromkeys(names.nouns, "thing")))
    assert matrix.shape == (CODE, len(names.nouns))
    torch.testing.assert_close(matrix.square().mean(0).sqrt(), torch.full((len(names.nouns),), EVIDENCE_GAIN))
    assert torch.equal(matrix[:, 0], matrix[:, 1])  # two classes of one noun


def test_names_are_most_like_those_they_are_taken_for(names: Names) -> None:
    small = replace(
        names, nouns=(*names.nouns[:3], "apple", "bus"), breeds=("",) * 5, learned=("apple", "bus")
    )
    weight, bias = torch.eye(3, HEAD), torch.zeros(3)
    weight[1, 0] = 0.8  # the second class is like the first
    pictures = torch.zeros(4, HEAD)
    pictures[:2, 0], pictures[2:, 2] = (
        9.0,
        9.0,
    )  # the classifier takes the first noun for class 0, the other for 2
    rows = alike(small, pictures, torch.tensor([0, 0, 1, 1]), weight, bias, count=1)
    assert [row[0] for row in rows] == [1, 0, pytest.approx(rows[2][0]), 0, 2]
    assert [row[1] for row in rows] == [3, rows[1][1], 4, 4, 3]
    assert all(number not in row for number, row in enumerate(rows))


def test_patterns_fall() -> None:
    ((sharp, soft),) = patterns(torch.tensor([[0.1, 0.5, 0.2, 0.0, 0.2]]), classes=3, count=2)
    assert sharp == pytest.approx([0.5, 0.2]) and soft == pytest.approx([0.2, 0.0])


def test_the_standard_names_are_imagenets_and_the_cut_outs() -> None:
    names = standard_names()
    assert names.classes == 1000 and len(set(names.learned)) == len(names.learned)
    assert {"woman", "apple"} <= set(names.learned) and "circle" not in names.learned
    assert len(names.nouns) == len(names.breeds) == 1000 + len(names.learned)
