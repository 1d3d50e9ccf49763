"""What the stem says of the whole picture: ImageNet's classes and the cut-outs' nouns, as one set of names.

The stem's own classifier knows 1,000 classes. Nouns that only cut-outs show (tomato, pear, man) are compared with
prototypes: the mean, over pictures of the noun, of the classifier's soft answers (how it errs about a tomato is much
the same for cut-outs and for photographs) and of the features. Both sides are centred, cut-outs by their mean and
photographs by that of unlabelled ones: without it the step from cut-outs to photographs is larger than any difference
of nouns.

The probabilities of all names are passed on as a sum of name codes, each of `CODE` values.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.modeling.stem import PROFILE_TEMPERATURE
from default_model.imagenet import read_imagenet
from default_model.materials import PICTURES, read_table

CODE = 128  # values of a name's code
# The root mean square of a code, beside 1 of a cell's other values: most names are far from sure.
EVIDENCE_GAIN = 3.0
COARSE, FINE = 320, 80  # channels kept of the stem's two maps: COARSE + 4 FINE + CODE = 768
SHARPNESS = 8.0  # of the prototypes' softmax, for features of mean length one
CATEGORY_SHARE = 0.5  # of a code that nouns of one category share, beside 1 of the noun's own


@dataclass(frozen=True)
class Names:
    """The names the stem gives probabilities for: first ImageNet's classes in their order, then the cut-outs' nouns.

    nouns: of each name, K + P of them. breeds: "" where there is none. learned: the cut-outs' nouns, P of them.
    """

    nouns: tuple[str, ...]
    breeds: tuple[str, ...]
    learned: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.nouns) - len(self.learned)


def standard_names() -> Names:
    """Those of imagenet.csv, objects.csv and pictures.csv. Plain shapes are not among them."""
    classes = read_imagenet()
    learned = tuple(sorted({row.noun for row in (*read_table(), *read_table(PICTURES))}))
    return Names(
        tuple(row.noun for row in classes) + learned,
        tuple(row.breed for row in classes) + ("",) * len(learned),
        learned,
    )


def name_codes(categories: dict[str, str]) -> dict[str, Tensor]:
    """A random vector [CODE] of length one for every noun, a little like those of the same category.

    categories: of every noun. A noun's code depends on its name alone, so that a longer list changes no other's.
    """

    def random(text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return F.normalize(torch.randn(CODE, generator=generator), dim=0)

    return {
        noun: F.normalize(random(noun) + CATEGORY_SHARE * random(f"category {category}"), dim=0)
        for noun, category in categories.items()
    }


def evidence_matrix(names: Names, codes: dict[str, Tensor]) -> Tensor:
    """[CODE, K + P]: the codes of all names; the root mean square is `EVIDENCE_GAIN` where one name is sure."""
    matrix = torch.stack([codes[noun] for noun in names.nouns], dim=1)
    return matrix * (EVIDENCE_GAIN * math.sqrt(CODE))


def profile(logits: Tensor) -> Tensor:
    """The classifier's soft answers: logits -> square roots of probabilities, [N, K], rows of unit length."""
    return (logits / PROFILE_TEMPERATURE).softmax(-1).sqrt()


def fit_prototypes(
    pictures: Tensor, labels: Tensor, photographs: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight [P, K + H] and bias [P] of `StemReadout.prototypes`.

    Args:
        pictures: [N, H], the head's mean over the cells of one cut-out.
        labels: int64 [N], its noun, 0..P - 1, each at least once.
        photographs: [M, H], the head's mean over unlabelled photographs.
        weight, bias: the classifier's, [K, H] and [K].
    """
    parts, shifts = [], []
    for ours, theirs in (
        (profile(pictures @ weight.mT + bias), profile(photographs @ weight.mT + bias)),
        (pictures, photographs),
    ):
        means = class_means(ours, labels)
        directions = F.normalize(means - ours.mean(0), dim=1)  # [P, ...]
        centre = theirs.mean(0)
        length = (theirs - centre).norm(dim=1).mean()
        parts.append(SHARPNESS * directions / length)
        shifts.append(-parts[-1] @ centre)
    return torch.cat(parts, dim=1), shifts[0] + shifts[1]


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """[N, H] and int64 [N] -> the mean of each class, [P, H]."""
    counts = torch.bincount(labels).clamp(min=1)
    sums = torch.zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def fit_coarse(
    pictures: Tensor, labels: Tensor, weight: Tensor, channels: int = COARSE, ridge: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Weight [C, H] and bias [C] of `StemReadout.coarse`: the directions that tell nouns and classes apart, whitened.

    Of the head's features within one noun made white, the subspace in which the classifier's rows and the nouns' means
    have most of their length; every channel then varies by about one.

    Args: as for `fit_prototypes`.
    """
    means = class_means(pictures, labels)
    inner = pictures - means[labels]
    covariance = inner.mT @ inner / len(inner)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
    values, vectors = torch.linalg.eigh(covariance)
    root, inverse = ((vectors * values**power) @ vectors.mT for power in (0.5, -0.5))
    rows = (weight - weight.mean(0)) @ root  # [K, H]
    between = (means - means.mean(0)) @ inverse  # [P, H]
    both = torch.cat([rows / rows.norm() * len(rows) ** 0.5, between / between.norm() * len(rows) ** 0.5])
    kept = torch.linalg.svd(both, full_matrices=False)[2][:channels] @ inverse  # [C, H]
    outputs = pictures @ kept.mT
    kept = kept / outputs.std(0)[:, None]
    return kept, -(pictures.mean(0) @ kept.mT)


def fit_fine(maps: Tensor, channels: int = FINE) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C] of `StemReadout.fine`: the principal components of positions [N, F], whitened."""
    mean = maps.mean(0)
    vectors, lengths, _ = torch.linalg.svd((maps - mean).mT / len(maps) ** 0.5, full_matrices=False)
    floor = lengths[0] * 0.1  # what varies little is mostly noise: not enlarged further
    kept = (vectors[:, :channels] / lengths[:channels].clamp(min=floor)).mT
    return kept, -(kept @ mean)


def alike(
    names: Names, pictures: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, count: int = 30
) -> list[list[int]]:
    """For every name the classes and then the learned names that it is most easily taken for, `count` of each.

    Classes are compared by the classifier's rows, learned names by its mean soft answers; a class and a learned name by
    the answer for the class.

    Args: as for `fit_prototypes`.
    """
    rows = F.normalize(weight - weight.mean(0), dim=1)
    means = class_means(profile(pictures @ weight.mT + bias), labels)
    means = F.normalize(means - means.mean(0), dim=1)
    first = names.classes
    likeness = torch.zeros(len(names.nouns), len(names.nouns))
    likeness[:first, :first] = rows @ rows.mT
    likeness[first:, :first], likeness[:first, first:] = means, means.mT
    likeness[first:, first:] = means @ means.mT
    likeness.fill_diagonal_(-torch.inf)
    return [
        row[:first].topk(count).indices.tolist() + (row[first:].topk(count).indices + first).tolist()
        for row in likeness
    ]


def patterns(probabilities: Tensor, classes: int, count: int = 12) -> list[tuple[list[float], list[float]]]:
    """How sharp the probabilities [N, K + P] of photographs are.

    Returns:
        For each photograph the `count` largest probabilities of the classes, and of the learned names, falling.
    """
    halves = (probabilities[:, :classes], probabilities[:, classes:])
    sharp, soft = (half.sort(descending=True).values[:, :count].round(decimals=4).tolist() for half in halves)
    return list(zip(sharp, soft, strict=True))
