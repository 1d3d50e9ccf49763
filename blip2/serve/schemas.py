"""What arrives and what leaves, as pydantic models: the OpenAPI document is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

from blip2.generation.options import GenerationOptions
from blip2.text import CAPTION_PROMPT

Words = Annotated[str, StringConstraints(strip_whitespace=False, min_length=1)]


class Strict(BaseModel):
    """Unknown fields are errors: a misspelt option must not pass for one that was followed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Decoding(Strict):
    """How a text is written; the same names and defaults as in Python."""

    num_beams: int | None = Field(
        None, ge=1, description="default: 5; 1 where sampling or streaming needs it"
    )
    max_new_tokens: int = Field(30, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    length_penalty: float = 1.0
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    num_return_sequences: int = Field(1, ge=1)
    temperature: float | None = Field(None, gt=0, description="asks for sampling")
    top_k: int | None = Field(None, ge=0, description="asks for sampling")
    top_p: float | None = Field(None, gt=0, le=1, description="asks for sampling")
    do_sample: bool | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = Field(False, description="server-sent events")

    def options(self) -> GenerationOptions:
        """Raises ValueError where they contradict each other."""
        shaped = (self.temperature or 1.0, self.top_k or 0, self.top_p or 1.0)
        sample = self.do_sample if self.do_sample is not None else shaped != (1.0, 0, 1.0)
        if self.stream and (self.num_return_sequences > 1 or (self.num_beams or 1) > 1):
            raise ValueError("stream writes one text as it comes: leave out beams and num_return_sequences")
        num_beams = self.num_beams if self.num_beams is not None else 1 if sample or self.stream else 5
        return GenerationOptions(
            num_beams=num_beams,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            num_return_sequences=self.num_return_sequences,
            do_sample=sample,
            temperature=shaped[0],
            top_k=shaped[1],
            top_p=shaped[2],
            seed=self.seed,
        )


IMAGE = "a data: URL, such as data:image/png;base64,...; an http(s) URL only where the server fetches them"


class CaptionRequest(Decoding):
    image: str = Field(description=IMAGE)
    prompt: str = Field(CAPTION_PROMPT, description="what the caption goes on from")


class AskRequest(Decoding):
    image: str = Field(description=IMAGE)
    question: Words
    length_penalty: float = -1.0


class MatchRequest(Strict):
    image: str = Field(description=IMAGE)
    texts: list[Words] = Field(min_length=1)


class EmbedRequest(Strict):
    images: list[str] = Field([], description=IMAGE)
    texts: list[Words] = []


class Turn(Strict):
    question: Words
    answer: Words


class ExplainRequest(Strict):
    image: str = Field(description=IMAGE)
    text: Words | None = Field(None, description="the caption to explain; default: the model's own")
    question: Words | None = Field(None, description="explain the answer to this")
    answer: Words | None = Field(None, description="the answer to explain; default: the model's own")
    turns: list[Turn] | None = Field(
        None, description="the question was asked in a conversation, after these; in JSON only"
    )
    layer: int | None = Field(None, ge=0, description="with head and query: the raw attention there")
    head: int | None = Field(None, ge=0)
    query: int | None = Field(None, ge=0)


class Token(BaseModel):
    text: str
    logprob: float


class Written(BaseModel):
    text: str
    score: float
    tokens: list[Token]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Captions(BaseModel):
    model: str
    captions: list[Written]
    usage: Usage


class Answers(BaseModel):
    model: str
    answers: list[Written]
    usage: Usage


class Match(BaseModel):
    text: str
    probability: float
    similarity: float


class Matches(BaseModel):
    model: str
    matches: list[Match]


class Embeddings(BaseModel):
    model: str
    images: list[list[list[float]]] = Field(
        description="for each image its queries' vectors, each of length 1"
    )
    texts: list[list[float]] = Field(description="for each text one vector of length 1")


class ExplainedWord(BaseModel):
    text: str
    logprob: float
    heat: list[list[float]] = Field(description="rows of the image encoder's grid, 0 to 1")


class Explained(BaseModel):
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


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """`content` as text or as parts; what else OpenAI's messages carry is not read."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Strict):
    """What chat and plain completions share. Greedy unless temperature or top_p asks for sampling."""

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
        texts = self.n or 1
        asked = self.temperature is not None or self.top_p is not None or texts > 1
        sample = asked and 0 not in (self.temperature, self.top_p)
        if texts > 1 and not sample:
            raise ValueError("n above 1 needs a temperature above 0: without chance all texts are the same")
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            num_return_sequences=texts,
            do_sample=sample,
            temperature=self.temperature or 1.0 if sample else 1.0,
            top_p=self.top_p or 1.0 if sample else 1.0,
            seed=None if self.seed is None else self.seed % 2**63,
        )


class PlainText(Strict):
    type: Literal["text"]


class ChatRequest(Sampling):
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


class CompletionRequest(Sampling):
    prompt: str | Annotated[list[str], Field(min_length=1)]
    image: str | None = Field(None, description="the picture (the client's extra_body): " + IMAGE)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: Any) -> Any:
        """Say it plainly where token ids arrive in place of text, as OpenAI's API takes them too."""
        if isinstance(prompt, list) and any(isinstance(each, int | list) for each in prompt):
            raise PydanticCustomError("token_ids", "token ids are not read here; send the prompt as text")
        return prompt

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


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


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    warnings: list[str] | None = Field(None, description="what in the request could not be followed")


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


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[PlainChoice]
    usage: Usage


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
