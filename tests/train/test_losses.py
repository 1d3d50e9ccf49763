"""Each loss against its definition, written out with numpy and loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blip2.train import losses


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def smoothed_cross_entropy(logits: np.ndarray, target: np.ndarray, smoothing: float) -> float:
    """As torch defines it: (1 - s) on the target, s spread over all classes."""
    logs = log_softmax(logits)
    return float(
        np.mean([-(1 - smoothing) * row[t] - smoothing * row.mean() for row, t in zip(logs, target)])
    )


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    return F.normalize(normal(5, 3, 8), dim=-1), F.normalize(normal(5, 8, seed=1), dim=-1)


def itc_loss(
    images: torch.Tensor, texts: torch.Tensor, temp: float, ids: torch.Tensor | None = None
) -> torch.Tensor:
    return losses.contrast(losses.query_similarity(images, texts, temp), ids)


def by_hand_similarity(images: torch.Tensor, texts: torch.Tensor, temp: float) -> np.ndarray:
    a, b = images.numpy().astype(np.float64), texts.numpy().astype(np.float64)
    return np.array([[max(q @ t for q in queries) / temp for t in b] for queries in a])


def test_itc(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, texts = embeddings
    similarity = by_hand_similarity(images, texts, 0.07)
    target = np.arange(5)
    theirs = (
        smoothed_cross_entropy(similarity, target, 0.1) + smoothed_cross_entropy(similarity.T, target, 0.1)
    ) / 2
    assert itc_loss(images, texts, 0.07).item() == pytest.approx(theirs, rel=1e-5)


def test_itc_with_equal_images(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, texts = embeddings
    ids = [7, 3, 7, 1, 3]
    similarity = by_hand_similarity(images, texts, 0.5)
    total = 0.0
    for matrix in (similarity, similarity.T):
        logs = log_softmax(matrix)
        for i in range(5):
            same = np.array([ids[i] == j for j in ids], float)
            target = 0.9 * same / same.sum() + 0.1 / 5
            total -= (target * logs[i]).sum() / 5
    ours = itc_loss(images, texts, 0.5, torch.tensor(ids))
    assert ours.item() == pytest.approx(total / 2, rel=1e-5)
    different = itc_loss(images, texts, 0.5, torch.arange(5))
    assert different.item() == pytest.approx(itc_loss(images, texts, 0.5).item(), rel=1e-6)


def test_itc_is_float32_under_autocast(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = itc_loss(*embeddings, 0.07)
    assert inside.item() == itc_loss(*embeddings, 0.07).item()


def test_hard_negatives_follow_the_softmax() -> None:
    i2t, t2i = normal(4, 4, seed=2), normal(4, 4, seed=3)
    generator = rng()
    counts = np.zeros((2, 4, 4))
    for _ in range(2000):
        for which, drawn in enumerate(losses.hard_negatives(i2t, t2i, generator)):
            counts[which, np.arange(4), drawn.numpy()] += 1
    for which, similarity in enumerate((i2t, t2i)):
        weights = np.exp(similarity.numpy())
        np.fill_diagonal(weights, 0)
        np.testing.assert_allclose(counts[which] / 2000, weights / weights.sum(1, keepdims=True), atol=0.05)


def test_hard_negatives_are_never_the_same_image() -> None:
    ids = torch.tensor([0, 1, 0, 1, 2])
    similarity = torch.eye(5) * 50  # its own text is by far the most similar one
    generator = rng()
    for _ in range(50):
        for drawn in losses.hard_negatives(similarity, similarity, generator, ids):
            assert (ids[drawn] != ids).all()
    with pytest.raises(ValueError, match="holds only one image"):
        losses.hard_negatives(similarity, similarity, generator, torch.zeros(5, dtype=torch.int64))


def test_itm() -> None:
    logits, labels = normal(6, 2), torch.tensor([1, 1, 0, 0, 0, 0])
    theirs = smoothed_cross_entropy(logits.numpy(), labels.numpy(), 0)
    assert losses.itm_loss(logits, labels).item() == pytest.approx(theirs, rel=1e-5)


def test_itg_and_language_loss() -> None:
    logits, ids = normal(2, 5, 9), torch.tensor([[8, 3, 4, 2, 0], [8, 5, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    pairs = [(0, 0, 3), (0, 1, 4), (0, 2, 2), (1, 0, 5), (1, 1, 2)]  # row, position, the token after it
    rows = np.stack([logits.numpy()[b, t] for b, t, _ in pairs])
    target = np.array([token for _, _, token in pairs])
    ours = losses.itg_loss(logits, ids, mask)
    assert ours.item() == pytest.approx(smoothed_cross_entropy(rows, target, 0.1), rel=1e-5)
    labels = ids.masked_fill(mask == 0, -100)
    plain = losses.language_loss(logits, labels)
    assert plain.item() == pytest.approx(smoothed_cross_entropy(rows, target, 0), rel=1e-5)
    assert losses.language_loss(logits, torch.full((2, 5), -100)).item() == 0
