"""Each loss against its definition, written out with numpy and loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from default_model import losses


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_clip() -> None:
    image, text, scale = normal(4, 6), normal(4, 6, seed=1), torch.tensor(1.7)
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (image, text))
    logits = math.exp(1.7) * a @ b.T
    theirs = -(np.diag(log_softmax(logits)).mean() + np.diag(log_softmax(logits.T)).mean()) / 2
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
