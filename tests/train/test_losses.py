"""Each loss against its definition, written out with numpy and loops."""

import math

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
    assert losses.itc_loss(images, texts, 0.07).item() == pytest.approx(theirs, rel=1e-5)


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
    ours = losses.itc_loss(images, texts, torch.tensor(0.5), image_ids=torch.tensor(ids))
    assert ours.item() == pytest.approx(total / 2, rel=1e-5)
    different = losses.itc_loss(images, texts, 0.5, image_ids=torch.arange(5))
    assert different.item() == pytest.approx(losses.itc_loss(images, texts, 0.5).item(), rel=1e-6)


def test_itc_is_float32_under_autocast(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.itc_loss(*embeddings, 0.07)
    assert inside.item() == losses.itc_loss(*embeddings, 0.07).item()


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


def test_clip() -> None:
    image, text, scale = normal(4, 6), normal(4, 6, seed=1), torch.tensor(1.7)
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (image, text))
    logits = math.exp(1.7) * a @ b.T
    theirs = (
        smoothed_cross_entropy(logits, np.arange(4), 0) + smoothed_cross_entropy(logits.T, np.arange(4), 0)
    ) / 2
    assert losses.clip_loss(image, text, scale).item() == pytest.approx(theirs, rel=1e-5)
    bounded = losses.clip_loss(image, text, torch.tensor(50.0))
    assert bounded.item() == pytest.approx(losses.clip_loss(image, text, torch.tensor(math.log(100))).item())


def test_clip_with_equal_texts() -> None:
    image, text = normal(2, 6), normal(1, 6, seed=1).expand(2, -1)
    same = losses.clip_loss(image, text, torch.tensor(0.0), torch.tensor([5, 5]))
    # one way the two texts are equal, so 1/2 each is the best guess; the other way both images are right
    rows = F.normalize(image, dim=-1) @ F.normalize(text[:1], dim=-1).mT
    back = -rows.T.log_softmax(1).mean()
    assert same.item() == pytest.approx((math.log(2) + back.item()) / 2, rel=1e-5)


def test_place_loss_is_a_share_of_the_variance() -> None:
    target = torch.rand(64, 50, 2, generator=torch.Generator().manual_seed(0))
    assert losses.place_loss(torch.full_like(target, 0.5), target).item() == pytest.approx(1, abs=0.05)
    assert losses.place_loss(target, target).item() == 0


def test_region_loss_weighs_objects_equally() -> None:
    patches, phrases, scale = normal(2, 6, 5), normal(3, 5, seed=1), torch.tensor(1.0)
    target = torch.tensor([[0, 0, 0, 1, -1, -1], [2, -1, 0, -1, -1, -1]])
    a = F.normalize(patches, dim=-1).numpy()
    p = F.normalize(phrases, dim=-1).numpy()
    objects = []
    for image in range(2):
        for phrase in range(3):
            places = [n for n in range(6) if target[image, n] == phrase]
            if places:
                by_patch = -log_softmax(math.e * a[image, places] @ p.T)[:, phrase].mean()
                mean = patches[image, places].mean(0).numpy()
                as_one = -log_softmax(math.e * (mean / np.linalg.norm(mean))[None] @ p.T)[0, phrase]
                objects.append((by_patch + 2 * as_one) / 3)
    ours = losses.region_loss(patches, phrases, target, scale)
    assert len(objects) == 4
    assert ours.item() == pytest.approx(float(np.mean(objects)), rel=1e-5)
    nothing = losses.region_loss(patches.requires_grad_(), phrases, torch.full((2, 6), -1), scale)
    assert nothing.item() == 0
    nothing.backward()
