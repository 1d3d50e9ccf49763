"""The models this version can load by name, and what each one needs: data, no weights and no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from blip2.modeling.config import MODES as MODES
from blip2.modeling.config import (
    Blip2Config,
    LanguageConfig,
    MatcherConfig,
    OptConfig,
    QFormerConfig,
    StemFacts,
    T5Config,
    VisionConfig,
    read_config,
)

DEFAULT = "default"
ASSETS = Path(__file__).parent / "assets"
DEFAULT_FOLDER = ASSETS / "default"  # the generating model
DEFAULT_MATCHER_FOLDER = ASSETS / "default-matcher"  # the stage-1 model that belongs to it

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of one parameter
PRECISIONS = ("fp32", "bf16", *MODES)  # that memory is estimated for
# Of a value stored in int4, and read by a product: a scale of 16 bits and a zero of 8 for 128 weights.
INT4_BYTES = 0.5 + 3 / 128
INT4_MEMORY = 0.62  # as OpenVINO holds a value, with what it works with; torch's kernel takes 0.53
STEM_WORKING_BYTES = 16 * 2**20  # a stem's largest maps of an image of 256 px
PROCESS_BYTES = 300 * 2**20  # Python with torch and the libraries, before any weight; 257 MiB measured


@dataclass(frozen=True)
class KnownModel:
    """A model that can be loaded by name.

    name: as on the Hugging Face Hub, or "default". alias: the short name. lavis: its name and type in LAVIS.
    parameters: those of the published ones are checked against the built model (tests/test_registry.py).
    disk_bytes: the published weights, which are fp32; the default model's and its matcher's files.
    stem: the network that images go through first, counted in both.
    """

    name: str
    alias: str
    use: str
    config: Blip2Config | MatcherConfig
    parameters: int
    disk_bytes: int
    lavis: str = ""
    stem: StemFacts | None = None

    @property
    def image_px(self) -> int:
        """Side of the square that images are squashed to."""
        return self.config.vision.image_size if self.stem is None else self.stem.image_px

    def memory_bytes(self, dtype: str) -> int:
        """Memory for one image with five beams of thirty new tokens, in a dtype or quantized: an estimate."""
        width = BYTES.get(dtype, 4)  # between quantized weights fp32 is computed
        vision = self.config.vision
        working = vision.num_positions * (8 * vision.hidden_size + 2 * vision.intermediate_size) * width
        if isinstance(self.config, Blip2Config):
            language, num_beams, prompt, new = self.config.language, 5, 16, 30
            positions = self.config.num_query_tokens + prompt + num_beams * new
            working += 2 * language.keys_per_position * positions * width  # keys and values
            working += 4 * num_beams * language.vocab_size * 4  # scores are float32 whatever the dtype
        if self.stem is not None:  # in fp32 whatever the dtype
            working += 4 * self.stem.parameters + STEM_WORKING_BYTES
        return PROCESS_BYTES + self._weight_bytes(dtype) + working

    def _weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights, a stem's aside."""
        parameters = self.parameters - (0 if self.stem is None else self.stem.parameters)
        if dtype in BYTES:
            return parameters * BYTES[dtype]
        vision = self.config.vision
        kept = 2 * vision.hidden_size * vision.intermediate_size  # in bf16, where the processor has it
        if isinstance(self.config, MatcherConfig):
            table = self.config.qformer.vocab_size * self.config.qformer.hidden_size  # stays fp32
            return parameters + kept + 3 * table
        language = self.config.language
        # the head is packed for its product: where it is the word embeddings' weight, that is in memory twice
        head = language.vocab_size * language.width if language.tie_word_embeddings else 0
        saved = 0.0 if dtype == "int8" else 1 - int4_bytes(language, INT4_MEMORY)
        return parameters + kept + head - int(saved * language.matrix_values())


def int4_bytes(language: LanguageConfig, inner: float = INT4_BYTES) -> float:
    """Bytes of a matrix's value in "int4", the mean over the language model's layers: first and last are in 8 bits."""
    ends = min(2, language.depth) / language.depth
    return ends + (1 - ends) * inner


_VIT_224 = VisionConfig(image_size=224)
_VIT_364 = VisionConfig(image_size=364)
_OPT_2B7 = OptConfig(hidden_size=2560, ffn_dim=10240)
_OPT_6B7 = OptConfig(hidden_size=4096, ffn_dim=16384)
_FLAN_XL = T5Config()
_FLAN_XXL = T5Config(d_model=4096, d_ff=10240, num_heads=64)
_WITH_TEXT = QFormerConfig(vocab_size=30523, use_qformer_text_input=True)  # 30522 of BERT, and [DEC]


def _published(
    name: str, vision: VisionConfig, language: LanguageConfig | None, parameters: int, lavis: str
) -> KnownModel:
    """A model on the Hub; one without a language model is for matching."""
    use = "captions, questions, chat" if vision is _VIT_224 else "captions in the style of COCO"
    config: Blip2Config | MatcherConfig = MatcherConfig(vision, _WITH_TEXT)
    if language is None:
        use = "matching, embeddings"
    else:
        config = Blip2Config(vision, language=language)
    alias = name.replace("-vit-g", "")
    return KnownModel(f"Salesforce/blip2-{name}", alias, use, config, parameters, 4 * parameters, lavis)


PUBLISHED = (
    _published("opt-2.7b", _VIT_224, _OPT_2B7, 3_744_679_936, "blip2_opt:pretrain_opt2.7b"),
    _published("opt-6.7b", _VIT_224, _OPT_6B7, 7_752_738_304, "blip2_opt:pretrain_opt6.7b"),
    _published("opt-2.7b-coco", _VIT_364, _OPT_2B7, 3_745_271_296, "blip2_opt:caption_coco_opt2.7b"),
    _published("opt-6.7b-coco", _VIT_364, _OPT_6B7, 7_753_329_664, "blip2_opt:caption_coco_opt6.7b"),
    _published("flan-t5-xl", _VIT_224, _FLAN_XL, 3_942_446_592, "blip2_t5:pretrain_flant5xl"),
    _published("flan-t5-xl-coco", _VIT_364, _FLAN_XL, 3_943_037_952, "blip2_t5:caption_coco_flant5xl"),
    _published("flan-t5-xxl", _VIT_224, _FLAN_XXL, 12_229_596_672, "blip2_t5:pretrain_flant5xxl"),
    _published("itm-vit-g", _VIT_224, None, 1_172_032_258, "blip2:pretrain"),
    _published("itm-vit-g-coco", _VIT_364, None, 1_172_623_618, "blip2:coco"),
)

# LAVIS's names for the stage-1 model in its other uses.
_LAVIS_USES = ("blip2_feature_extractor:", "blip2_image_text_matching:")
# Models of LAVIS that are not on the Hub -> its file, and what else it takes.
_LAVIS_FILES = {
    "blip2:pretrain_vitL": ("blip2_pretrained_vitL.pth", "vision='clip_vit_L.pth'"),
    "blip2_t5:pretrain_flant5xl_vitL": (
        "blip2_pretrained_flant5xl_vitL.pth",
        "vision='clip_vit_L.pth' and language='google/flan-t5-xl'",
    ),
}
_LAVIS_ADDRESS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


def default_dtype(parameters: int) -> str:
    """The dtype of a model where none is given.

    Up to a billion parameters fp32: processors are quick in it, and nothing is lost whatever the file holds. Above
    bf16: half the memory, and its range is that of fp32, where fp16 turns image features into NaN.
    """
    return "fp32" if parameters <= 1_000_000_000 else "bf16"


def resolve_alias(name: str) -> str:
    """An alias, or a model's name and type in LAVIS -> the name on the Hub; any other name as it is.

    Raises ValueError for a model of LAVIS that is not on the Hub; the message says how to load it.
    """
    if name.startswith(_LAVIS_USES):
        name = f"blip2:{name.partition(':')[2]}"
    if name in _LAVIS_FILES:
        file, parts = _LAVIS_FILES[name]
        url = _LAVIS_ADDRESS + file
        raise ValueError(f"{name} is not on the Hub: get {url} and give the file, with {parts}")
    return next((model.name for model in PUBLISHED if name in (model.alias, model.lavis)), name)


def known_models() -> tuple[KnownModel, ...]:
    """The default model, where this installation holds it, and the published ones."""
    default = (default_model(),) if (DEFAULT_FOLDER / "config.json").is_file() else ()
    return default + PUBLISHED


def default_model() -> KnownModel:
    """The model that ships with the package, its matcher counted in. Raises ValueError where it does not."""
    use = "captions, questions, chat, matching; knows a few hundred objects, ships with the package"
    if not (DEFAULT_FOLDER / "config.json").is_file():
        raise ValueError("this installation holds no default model; name one, such as 'opt-2.7b'")
    return folder_model(DEFAULT_FOLDER, DEFAULT_MATCHER_FOLDER, name=DEFAULT, use=use)


def folder_model(folder: Path, *more: Path, name: str, use: str = "") -> KnownModel:
    """The model in a Hugging Face folder, and the weights in `more` folders beside it.

    Raises ValueError where the folder holds no model that this package can build.
    """
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        weights = [file for directory in (folder, *more) for file in directory.glob("*.safetensors")]
        stem = _stored_stem(folder)
        parameters = sum(_stored_tensors(file)[1] for file in weights)
        disk_bytes = sum(file.stat().st_size for file in weights)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: cannot be read as a model's folder ({error})") from error
    if not weights:
        raise ValueError(f"{name}: {folder} holds a config.json but no weights (*.safetensors)")
    return KnownModel(name, "", use, read_config(raw), parameters, disk_bytes, stem=stem)


def _stored_stem(folder: Path) -> StemFacts | None:
    """The stem in a model's folder, as preprocessor_config.json names it; what is wrong with it is found by loading."""
    settings = folder / "preprocessor_config.json"
    raw = json.loads(settings.read_bytes()) if settings.is_file() else {}
    if "stem" not in raw:
        return None
    file = folder / raw["stem"]["file"]
    tensors, parameters = _stored_tensors(file)
    return StemFacts(
        raw["stem"].get("origin", ""), raw["size"]["height"], tensors, parameters, file.stat().st_size
    )


def _stored_tensors(file: Path) -> tuple[int, int]:
    """How many tensors and parameters a safetensors file holds, from its header: eight bytes of length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
    return len(shapes), sum(map(math.prod, shapes))


def describe_stem(stem: StemFacts) -> str:
    """A stem for people: 'EfficientNet-Lite2, Apache-2.0 (12 MiB)'."""
    return f"{stem.origin or 'a stem of unknown origin'} ({readable(stem.disk_bytes)})"


def readable(size: int | None) -> str:
    """Bytes for people: '15.0 GiB', '350 MiB'."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
