"""Other layouts than Hugging Face's, against transformers on the same weights, and our files in its hands and torch's.

The names of LAVIS are written out as transformers' own conversion script renames them, not with our tables.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from reference import CLOSE, our_logits, reopened, their_blip2, their_logits
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM

from blip2.checkpoint import convert, load_model
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.language import IGNORE_INDEX
from blip2.train.tasks import Stage1, Stage2


def folder_logits(folder: Path, **parts: Path) -> Tensor:
    return our_logits(load_model(folder, dtype="fp32", **parts))


def lavis_state(theirs: Blip2ForConditionalGeneration) -> dict[str, Tensor]:
    """The state dict of LAVIS's Blip2OPT with these weights: the script's steps, backwards."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("qkv.bias"):
            query, key, value = tensor.chunk(3)
            assert not key.any()
            prefix = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
            prefix = prefix.removesuffix("self_attn.qkv.bias") + "attn."
            state |= {prefix + "q_bias": query.clone(), prefix + "v_bias": value.clone()}
            continue
        for old, new in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "ln_vision"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("layer_norm", "norm") if name.startswith("vision_model") else ("", ""),
            ("self_attn.qkv", "attn.qkv"),
            ("self_attn.projection", "attn.proj"),
            ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.", "Qformer.bert."),
            ("attention.attention", "attention.self"),
            ("language_projection", "opt_proj"),
            ("language_model", "opt_model"),
        ):
            name = name.replace(old, new) if old else name
        state[name] = tensor.clone()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(20)[None]
    return state


def without_key_bias(theirs: Blip2ForConditionalGeneration) -> Blip2ForConditionalGeneration:
    for name, parameter in theirs.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()
    return theirs


def test_a_lavis_file(tmp_path: Path) -> None:
    """torch.save's file, whole, then without its frozen parts as LAVIS's trainer leaves it."""
    theirs = without_key_bias(their_blip2())
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "lavis").mkdir()
    config = (tmp_path / "theirs" / "config.json").read_text()  # tiny models' shapes do not show their heads
    (tmp_path / "lavis" / "config.json").write_text(config)
    state = lavis_state(theirs)
    beside = {"optimizer": {"step": 3}, "epoch": 4, "scaler": None}
    torch.save({"model": state, **beside}, tmp_path / "lavis" / "checkpoint_4.pth")
    torch.testing.assert_close(folder_logits(tmp_path / "lavis"), their_logits(theirs), **CLOSE)

    language = OPTForCausalLM(theirs.config.text_config)
    language.load_state_dict(theirs.language_model.state_dict())
    language.save_pretrained(tmp_path / "opt")
    encoder = {
        n.removeprefix("visual_encoder."): t for n, t in state.items() if n.startswith("visual_encoder.")
    }
    torch.save(encoder, tmp_path / "eva.pth")
    left = {n: t for n, t in state.items() if not n.startswith(("visual_encoder.", "opt_model.model."))}
    assert "opt_model.lm_head.weight" in left  # the tied head's own name stays
    torch.save({"model": left, **beside}, tmp_path / "lavis" / "checkpoint_4.pth")
    parts = {"vision": tmp_path / "eva.pth", "language": tmp_path / "opt"}
    torch.testing.assert_close(folder_logits(tmp_path / "lavis", **parts), their_logits(theirs), **CLOSE)


@pytest.mark.parametrize("to", ["paddle", "lavis"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_came_back_opens_in_transformers(to: str, tied: bool, tmp_path: Path) -> None:
    theirs = their_blip2(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "there", to=to)  # type: ignore[arg-type]
    torch.testing.assert_close(folder_logits(tmp_path / "there"), their_logits(theirs), **CLOSE)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert torch.equal(their_logits(reopened(tmp_path / "back")), their_logits(theirs))


def test_torch_and_lavis_open_ours(tmp_path: Path) -> None:
    """`torch.load(weights_only=True)`, with every tensor where LAVIS has it."""
    theirs = without_key_bias(their_blip2())
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "lavis", to="lavis")
    written = torch.load(tmp_path / "lavis" / "model.pth", weights_only=True)["model"]
    expected = lavis_state(theirs)
    # the one is only counted, the other tied
    del expected["Qformer.bert.embeddings.position_ids"], expected["opt_model.lm_head.weight"]
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((tmp_path / "lavis" / "config.yaml").read_text())
    assert settings["model"]["image_size"] == 32
    assert settings["model"]["finetuned"] == str(tmp_path / "lavis" / "model.pth")
    assert settings["preprocess"]["vis_processor"]["eval"] == {"name": "blip_image_eval", "image_size": 32}


def test_a_pytorch_bin(tmp_path: Path) -> None:
    """`pytorch_model.bin`, head and embeddings sharing a storage, single and sharded."""
    theirs = their_blip2()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(folder_logits(tmp_path), their_logits(theirs), **CLOSE)
    convert(tmp_path, tmp_path / "paddle", to="paddle", verify=True)
    (tmp_path / "pytorch_model.bin").unlink()
    names = [*state]
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, some in shards.items():
        torch.save({name: state[name].clone() for name in some}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(folder_logits(tmp_path), their_logits(theirs), **CLOSE)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_paddlenlps_own_model(kind: str, tmp_path: Path) -> None:
    """A model as PaddleNLP saved it, and the logits it gave (recorded by make_paddlenlp.py)."""
    folder = Path(__file__).parent / "fixtures" / f"paddlenlp-{kind}"
    theirs = np.load(folder / "expected.npz")
    ids = torch.from_numpy(theirs["ids"])
    for path in (folder, convert(folder, tmp_path / "hf", to="hf", verify=True).folder):
        ours = load_model(path)
        assert isinstance(ours, Blip2)
        assert ours.config.vision.layer_norm_eps == 1e-5  # Paddle's default means what it says
        with torch.inference_mode():
            logits = ours(
                torch.from_numpy(theirs["pixels"]), ids, torch.ones_like(ids), ids if kind == "t5" else None
            )
        torch.testing.assert_close(logits, torch.from_numpy(theirs["logits"]), **CLOSE)


@pytest.mark.parametrize("to", ["hf", "paddle", "lavis"])
def test_lavis_own_stage_1(to: str, tmp_path: Path) -> None:
    """ITC, ITM and ITG of a model as LAVIS saved it, and its two scores of a pair (recorded by make_lavis.py)."""
    folder = Path(__file__).parent / "fixtures" / "lavis-stage1"
    theirs = {name: torch.from_numpy(value) for name, value in np.load(folder / "expected.npz").items()}
    conversion = convert(folder / "checkpoint.pth", tmp_path / to, to=to, verify=True)  # type: ignore[arg-type]
    for path in (folder / "checkpoint.pth", conversion.folder):
        ours = load_model(path, dtype="fp32").eval()
        assert isinstance(ours, Blip2Matcher)
        task = Stage1(ours, int(theirs["dec"]))
        batch = {name: theirs[name] for name in ("pixels", "ids", "mask")}
        with torch.inference_mode():
            losses = task.losses(batch, torch.Generator().manual_seed(0))
            for name, expected in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
                torch.testing.assert_close(losses[name], theirs[expected], **CLOSE)
            features = ours.vision(theirs["pixels"])
            ids, mask = theirs["ids"][:1].expand(2, -1), theirs["mask"][:1].expand(2, -1)
            torch.testing.assert_close(ours.itm_logits(features, ids, mask), theirs["itm_logits"], **CLOSE)
            queries = ours.project_queries(ours.qformer(features))  # [2, Q, E]
            scores = (queries * ours.text_embeddings(ids, mask)[:, None]).sum(-1).amax(1, keepdim=True)
            torch.testing.assert_close(scores, theirs["itc_scores"], **CLOSE)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_lavis_own_stage_2(kind: str, tmp_path: Path) -> None:
    """The loss of a model as LAVIS saved it (recorded by make_lavis.py)."""
    folder = Path(__file__).parent / "fixtures" / f"lavis-{kind}"
    theirs = {name: torch.from_numpy(value) for name, value in np.load(folder / "expected.npz").items()}
    pad = 1 if kind == "opt" else 0
    ids = theirs["ids_0"]
    mask = (ids != pad).long()
    labels = (theirs["ids_1"] if kind == "t5" else ids).clone()
    labels[labels == pad] = IGNORE_INDEX
    if kind == "opt":
        labels[:, :4] = IGNORE_INDEX  # </s> and the prompt, "a photo of"
    batch = {"pixels": theirs["pixels"], "input_ids": ids, "attention_mask": mask, "labels": labels}
    for path in (folder, convert(folder, tmp_path / "hf", to="hf", verify=True).folder):
        ours = load_model(path, dtype="fp32").eval()
        assert isinstance(ours, Blip2)
        with torch.inference_mode():
            loss = Stage2(ours).losses(batch, torch.Generator())["loss"]
        torch.testing.assert_close(loss, theirs["loss"], **CLOSE)
