"""The models: `Blip2` writes text about an image, `Blip2Matcher` (stage 1) says how well a text fits one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig
from blip2.modeling.kv_cache import KVCache, PromptCache, concat_prompt_caches
from blip2.modeling.layers import ACTIVATION
from blip2.modeling.opt import Opt
from blip2.modeling.qformer import QFormer
from blip2.modeling.t5 import T5
from blip2.modeling.vision import ImageEncoder
from blip2.quantization.packed import Linear

IGNORE_INDEX = -100  # label of a position that is no target
T5_TRAINED_TOKENS = 512  # the longest text T5 was trained on; it has no last position


class Blip2(nn.Module):
    """Image encoder -> Q-Former -> projection -> language model."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = ImageEncoder(config.vision)
        self.qformer = QFormer(config.qformer, config.num_query_tokens)
        self.projection = Linear(config.qformer.hidden_size, config.language.width)
        self.language: Opt | T5
        if isinstance(config.language, OptConfig):
            self.language = Opt(config.language)
        else:
            self.language = T5(config.language)

    def embed_image(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """Pixels [B, 3, S, S] -> prefix [B, Q, W]: what the language model reads first."""
        return self.project(self.qformer(self.vision(pixels, interpolate=interpolate)))

    def project(self, queries: Tensor) -> Tensor:
        """Queries [B, Q, W_qformer] -> prefix [B, Q, W_language]."""
        out: Tensor = self.projection(queries.to(self.projection.weight.dtype))
        return out

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Pixels and text [B, T] -> logits.

        With OPT [B, Q + T, V] for every position, the queries first. T5 reads the text and writes another, of which
        decoder_input_ids [B, L] are the start token and all tokens but the last: logits [B, L, V].
        """
        return self.logits_from_prefix(self.embed_image(pixels), input_ids, attention_mask, decoder_input_ids)

    def logits_from_prefix(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for images that have been embedded already."""
        return self.language.head(self._hidden(prefix, input_ids, attention_mask, decoder_input_ids))

    def _hidden(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
    ) -> Tensor:
        """What the head turns into logits: OPT's hidden states of queries and text, T5's of the text it writes."""
        embeddings = torch.cat([prefix, self.language.embed(input_ids).to(prefix.dtype)], dim=1)
        mask = None if attention_mask is None else F.pad(attention_mask, (prefix.shape[1], 0), value=1)
        if isinstance(self.language, T5) != (decoder_input_ids is not None):
            raise ValueError("decoder_input_ids are for T5, which cannot do without; OPT takes none")
        given = (embeddings, mask) if decoder_input_ids is None else (embeddings, mask, decoder_input_ids)
        out: Tensor = self.language(*given)
        return out

    def loss(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Mean cross-entropy of the labels, a scalar.

        Args:
            labels: -100 where a position is no target. With OPT [B, T], the id that stands at each text position, or
                [B, Q + T]; each is predicted from what stands before it, the first one from the queries. With T5
                [B, L], the text to write, its end token included. Shifted inside.
        """
        return self.loss_from_prefix(self.embed_image(pixels), input_ids, attention_mask, labels)

    def loss_from_prefix(
        self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        """As `loss`, for images that have been embedded already."""
        if isinstance(self.language, T5):
            targets = labels
            hidden = self._hidden(prefix, input_ids, attention_mask, self.language.shift_right(labels))
        else:
            hidden = self._hidden(prefix, input_ids, attention_mask, None)
            targets = F.pad(labels, (hidden.shape[1] - labels.shape[1], 0), value=IGNORE_INDEX)[:, 1:]
            hidden = hidden[:, :-1]
        wanted = targets != IGNORE_INDEX
        # The head is as wide as the vocabulary: only where something is to be predicted.
        return F.cross_entropy(self.language.head(hidden[wanted]).float(), targets[wanted])

    def prompt_room(self, max_new_tokens: int) -> int:
        """How many tokens a prompt may have."""
        queries = self.config.num_query_tokens
        if isinstance(self.config.language, OptConfig):
            return self.config.language.max_position_embeddings - queries - max_new_tokens
        return T5_TRAINED_TOKENS - queries

    # --- generation: read once, write as many rows as wanted -----------------------------------------------------

    def read_prefix(self, prefix: Tensor) -> PromptCache | None:
        """The prefix as the language model has read it: a value that serves every later question about the image.

        None with T5, whose encoder reads prefix and prompt together.
        """
        return self.language.read(prefix)[1] if isinstance(self.language, Opt) else None

    def start(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: int = 1,
        max_new_tokens: int,
        context: PromptCache | None = None,
    ) -> DecodeState:
        """Read the prefix and the prompts, ready to write `rows` continuations of each prompt.

        Args:
            prefix: [B, Q, W].
            input_ids, attention_mask: [B, T], padded on either side.
            context: the prefix as `read_prefix` gave it; the prefix is then not read again.

        Raises:
            ValueError: prefix, prompt and new tokens are longer than the language model's positions.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeddings = self.language.embed(input_ids).to(prefix.dtype)
        if context is None:
            embeddings = torch.cat([prefix, embeddings], dim=1)
            mask = F.pad(mask, (prefix.shape[1], 0), value=1)
        if isinstance(self.language, T5):
            if context is not None:
                raise ValueError("T5 reads prefix and prompt together and has no context of a prefix alone")
            started = self.language.start(embeddings, mask, rows=rows, max_new_tokens=max_new_tokens)
        else:
            started = self.language.start(embeddings, mask, context, rows=rows, max_new_tokens=max_new_tokens)
        return DecodeState(self.language, *started)


class DecodeState:
    """A text being written: B prompts, n rows of each, the rows of a prompt adjacent.

    logits: float32 [B, V], for the first new token.
    """

    def __init__(self, language: Opt | T5, context: PromptCache, tail: KVCache, logits: Tensor) -> None:
        self._language, self._context, self._tail = language, context, tail
        self.logits = logits
        self._begun = tail.buffer, tail.length  # all rows are the same so far

    def step(self, ids: Tensor) -> Tensor:
        """Append ids int64 [B * n]; logits float32 [B * n, V] for the token after them."""
        return self._language.step(ids, self._context, self._tail)

    def prefixes(self, queries: int) -> list[PromptCache | None]:
        """Each prompt's prefix of so many queries, as `Blip2.read_prefix` gives it: it was read before the prompt."""
        if isinstance(self._language, T5):
            return [None] * len(self._context.mask)
        layers, mask = self._context.layers, self._context.mask[:, :queries]
        return [  # copied, so that nobody holds the prompts as well
            PromptCache(
                tuple(
                    (k[i : i + 1, :, :queries].clone(), v[i : i + 1, :, :queries].clone()) for k, v in layers
                ),
                mask[i : i + 1].clone(),
            )
            for i in range(len(mask))
        ]

    def reorder(self, parents: Tensor) -> None:
        """Row i goes on from what row parents[i] (int64 [B * n], of the same prompt) has written."""
        self._tail.select(parents)

    def rewind(self) -> None:
        """Back to before the first new token, with all rows; not after `keep`."""
        self._tail.buffer, self._tail.length = self._begun

    def keep(self, prompts: Tensor) -> None:
        """Go on with these prompts (int64 [k]) and all their rows, in this order; drop the others.

        A prompt named twice is there twice from now on.
        """
        rows = self._tail.buffer.shape[2] // len(self._context.mask)
        self._context = self._context.select(prompts)
        self._tail.select((prompts[:, None] * rows + torch.arange(rows, device=prompts.device)).flatten())

    def join(self, other: DecodeState) -> None:
        """Take in another text's prompts, which may have written more or less than these; one row a prompt in both."""
        self._context = concat_prompt_caches([self._context, other._context])
        self._tail = self._tail.join(other._tail)


class TextHead(nn.Module):
    """BERT's head: hidden states [..., W] -> logits over the text vocabulary, on the word embeddings' weight."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATION[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.LayerNorm(self.activation(self.dense(hidden))), words, self.bias)


class Blip2Matcher(nn.Module):
    """The stage-1 model: image-text contrast (ITC), matching (ITM) and image-grounded generation (ITG).

    Checkpoints for matching alone hold no ITG head; `itg_head` is then None.
    """

    def __init__(self, config: MatcherConfig, *, itg: bool = True) -> None:
        super().__init__()
        self.config = config
        width, shared = config.qformer.hidden_size, config.image_text_hidden_size
        self.vision = ImageEncoder(config.vision)
        self.qformer = QFormer(config.qformer, config.num_query_tokens, words=True)
        self.vision_projection = Linear(width, shared)
        self.text_projection = Linear(width, shared)
        self.itm_head = Linear(width, 2)
        self.itg_head = TextHead(config.qformer) if itg else None
        self.temp = nn.Parameter(torch.tensor(0.07)) if itg else None  # the contrastive loss's temperature

    def image_embeddings(self, features: Tensor) -> Tensor:
        """Image features [B, N, W] -> [B, Q, E], each query of length 1."""
        return self.project_queries(self.qformer(features))

    def project_queries(self, queries: Tensor) -> Tensor:
        """Queries [B, Q, W] -> [B, Q, E], each of length 1."""
        return F.normalize(self.vision_projection(queries.to(self.vision_projection.weight.dtype)), dim=-1)

    def text_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text [B, T], beginning with [CLS] -> [B, E], of length 1."""
        first = self.qformer.read_text(ids, mask)[:, 0]
        return F.normalize(self.text_projection(first.to(self.text_projection.weight.dtype)), dim=-1)

    def itm_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Each image with its text -> [B, 2]; softmax column 1 is the probability that they match."""
        queries = self.qformer.encode_multimodal(features, ids, mask)[:, : self.config.num_query_tokens]
        out: Tensor = self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1)
        return out

    def itg_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text [B, T], beginning with [DEC] -> logits [B, T, V] for the token after each position."""
        return self.queries_and_itg_logits(features, ids, mask)[1]

    def queries_and_itg_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The queries as `qformer(features)` gives them and the ITG logits, in one pass."""
        if self.itg_head is None:
            raise ValueError("this checkpoint is for matching alone: it holds no head for generation (ITG)")
        hidden = self.qformer.write_text(features, ids, mask)
        queries, text = hidden.split([self.config.num_query_tokens, ids.shape[1]], dim=1)
        return queries, self.itg_head(text, self.qformer.word_embeddings.weight)
