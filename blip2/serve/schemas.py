"""Request and response bodies as pydantic models, from which the OpenAPI document is made."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    field_validator,
)
from pydantic_core import PydanticCustomError

from blip2.generation.options import GenerationOptions, TextKind, bounds_of, make_options
from blip2.text import CAPTION_PROMPT, is_blank

MAX_END_TOKENS = 64  # ids that end a text, in one request
IMAGE = "a data: URL, such as data:image/png;base64,...; an http(s) URL only where the server fetches them"


def _not_blank(text: str) -> str:
    if is_blank(text):
        raise PydanticCustomError("blank", "there is nothing in it to be read; write some words")
    return text


def _only_null(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "there is no such field here; leave it out, or send null")


NonEmptyText = Annotated[str, AfterValidator(_not_blank), WithJsonSchema({"type": "string", "minLength": 1})]
Unsupported = Annotated[
    None, BeforeValidator(_only_null)
]  # of OpenAI's API; null, which clients send too, is let pass


class Strict(BaseModel):
    """Unknown fields are errors: a misspelt option must not be passed over in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextRequest(Strict):
    """A request for captions or answers; `with_options` adds the decoding options to a subclass."""

    kind: ClassVar[TextKind]
    image: str = Field(description=IMAGE)
    stream: bool = Field(False, description="server-sent events")
    num_beams: int | None = None

    def options(self) -> GenerationOptions:
        """Raises ValueError where they contradict each other."""
        values = {option.name: getattr(self, option.name) for option in fields(GenerationOptions)}
        return make_options(self.kind, stream=self.stream, **values)


AnyRequest = TypeVar("AnyRequest", bound=TextRequest)


def with_options(schema: type[AnyRequest]) -> type[AnyRequest]:
    """A request's schema with the decoding options as fields: those of Python, None where they are not set."""
    hints, defaults = get_type_hints(GenerationOptions), make_options(schema.kind)
    added: dict[str, Any] = {}
    for option in fields(GenerationOptions):
        name, about, bounds = option.name, option.metadata["help"], bounds_of(option)
        kind: Any = hints[name]
        if name == "num_beams":
            about = f"{about}; 1 where the text is sampled or streamed"
        elif name == "eos_token_id":  # JSON has no tuples
            token_id: Any = Annotated[int, Field(**bounds)]  # type: ignore[call-overload]
            kind, bounds = token_id | Annotated[list[token_id], Field(max_length=MAX_END_TOKENS)], {}
        default = None if name == "do_sample" else getattr(defaults, name)  # false would forbid a temperature
        extra: Any = {"json_schema_extra": {"default": default}, **bounds}
        added[name] = kind | None, Field(None, description=about, **extra)
    return create_model(schema.__name__, __base__=schema, __module__=schema.__module__, **added)


@with_options
class CaptionRequest(TextRequest):
    kind = "caption"
    prompt: str = Field(CAPTION_PROMPT, description="what the caption continues")


@with_options
class AskRequest(TextRequest):
    kind = "answer"
    question: NonEmptyText


class MatchRequest(Strict):
    image: str = Field(description=IMAGE)
    texts: list[NonEmptyText] = Field(min_length=1)


class EmbedRequest(Strict):
    images: list[str] = Field([], description=IMAGE)
    texts: list[NonEmptyText] = []


class Turn(Strict):
    question: NonEmptyText
    answer: NonEmptyText


class ExplainRequest(Strict):
    image: str = Field(description=IMAGE)
    text: NonEmptyText | None = Field(None, description="the caption to explain; default: the model's own")
    question: NonEmptyText | None = Field(None, description="explain the answer to this")
    answer: NonEmptyText | None = Field(None, description="the answer to explain; default: the model's own")
    turns: list[Turn] | None = Field(None, description="the conversation before the question; in JSON only")
    layer: int | None = Field(None, ge=0, description="with head and query: the raw attention there")
    head: int | None = Field(None, ge=0)
    query: int | None = Field(None, ge=0)


class Token(BaseModel):
    text: str
    logprob: float


class GeneratedTextSchema(BaseModel):
    text: str
    score: float = Field(description="by which texts are compared; see length_penalty")
    logprob: float = Field(
        description="the natural logarithm of the probability of the whole text, its end included"
    )
    tokens: list[Token]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextResult(BaseModel):
    model: str
    usage: Usage


class CaptionSchema(GeneratedTextSchema):
    probability_right: float | None = Field(
        None, description="how likely it is right, 0 to 1; of calibrated models"
    )


class Captions(TextResult):
    captions: list[CaptionSchema]
    warnings: list[str] | None = Field(None, description="why they may well be wrong, where they may")


class Answers(TextResult):
    answers: list[GeneratedTextSchema]


class MatchSchema(BaseModel):
    text: str
    probability: float
    similarity: float


class Matches(BaseModel):
    model: str
    matches: list[MatchSchema]


class Embeddings(BaseModel):
    model: str
    images: list[list[list[float]]] = Field(description="for each image its queries' vectors, of length 1")
    texts: list[list[float]] = Field(description="for each text one vector of length 1")


class ExplainedWord(Token):
    heat: list[list[float]] = Field(description="rows of the image encoder's grid, 0 to 1")


class ExplanationSchema(BaseModel):
    model: str
    text: str
    words: list[ExplainedWord]
    width: int
    height: int
    attention_shape: list[int] = Field(description="layers, heads and queries to choose among")
    attention: list[list[float]] | None = Field(None, description="raw attention of layer, head and query")


# --- OpenAI's -------------------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody


class ImageUrl(Strict):
    url: str = Field(description=IMAGE)
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Unsupported = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Unsupported = None


class Message(BaseModel):
    """`content` as text or as parts; other fields of OpenAI's messages are not read."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    def text_and_images(self) -> tuple[str | None, list[str]]:
        """Its text, None where it has none, and its images' URLs."""
        if self.content is None or isinstance(self.content, str):
            return self.content, []
        texts = [part.text for part in self.content if isinstance(part, TextPart)]
        images = [part.image_url.url for part in self.content if isinstance(part, ImagePart)]
        return " ".join(texts) if texts else None, images


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CompletionSettings(Strict):
    """What chat and plain completions share. Greedy unless temperature, top_p or n above 1 requests sampling."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="not read")
    metadata: dict[str, Any] | None = Field(None, description="not read")
    presence_penalty: Literal[0] | None = Field(None, description="there is none: 0")
    frequency_penalty: Literal[0] | None = Field(None, description="there is none: 0")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="there is none: {}")

    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    def options(self, max_new_tokens: int) -> GenerationOptions:
        """Raises ValueError where they contradict each other."""
        texts, greedy = self.n or 1, 0 in (self.temperature, self.top_p)
        if texts > 1 and greedy:
            raise ValueError("n above 1 needs a temperature above 0: without chance all texts are the same")
        return make_options(
            "caption",
            num_beams=1,
            max_new_tokens=max_new_tokens,
            num_return_sequences=texts,
            do_sample=True if texts > 1 else None,
            temperature=0 if greedy else self.temperature,
            top_p=None if greedy else self.top_p,
            seed=None if self.seed is None else self.seed % 2**63,
        )


class PlainText(Strict):
    type: Literal["text"]


class ChatRequest(CompletionSettings):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: Literal[False] | None = Field(None, description="nothing is stored")
    response_format: PlainText | None = Field(None, description="there is no other")
    modalities: list[Literal["text"]] | None = Field(None, description="there is no other")
    tools: list[Any] | None = Field(None, max_length=0, description="there are none: []")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="there are no tools")
    parallel_tool_calls: bool | None = Field(None, description="there are no tools")
    service_tier: Literal["auto", "default"] | None = Field(None, description="there is no other")
    safety_identifier: str | None = Field(None, description="not read")
    prompt_cache_key: str | None = Field(None, description="not read")
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class CompletionRequest(CompletionSettings):
    prompt: str | Annotated[list[str], Field(min_length=1)] | None = Field(description="null: an empty one")
    image: str | None = Field(None, description="the image (the client's extra_body): " + IMAGE)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Unsupported = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: Any) -> Any:
        """Token ids in place of text, which OpenAI's API takes too, get a message of their own."""
        if isinstance(prompt, list) and any(isinstance(item, int | list) for item in prompt):
            raise PydanticCustomError("token_ids", "token ids are not read here; send the prompt as text")
        return prompt

    def prompts(self) -> tuple[str, ...]:
        return tuple(self.prompt) if isinstance(self.prompt, list) else (self.prompt or "",)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None


class ChatCompletion(TextResult):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    choices: list[ChatChoice]
    warnings: list[str] | None = Field(
        None, description="parts of the request that were not followed, and why a caption may well be wrong"
    )


class PlainLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class PlainChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: PlainLogprobs | None


class Completion(TextResult):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    choices: list[PlainChoice]
    warnings: list[str] | None = Field(None, description="why a caption may well be wrong, where it may")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class State(BaseModel):
    status: str
