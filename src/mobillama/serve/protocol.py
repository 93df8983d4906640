"""OpenAI's requests, checked: every field in its range, what is not offered refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mobillama.data.template import Message
from mobillama.engine.sampling import Sampling
from mobillama.errors import MobiLlamaError, UsageError, did_you_mean

MOST_CHOICES, MOST_STOPS, MOST_STOP_LENGTH, MOST_TOP, MOST_MESSAGES = 8, 4, 256, 20, 2048
_MOST_SEED = 2**63 - 1

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SHARED = ("model", "n", "seed", "stop", "stream", "stream_options", *_SAMPLING)
_CHAT = (*_SHARED, "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs")
_COMPLETION = (*_SHARED, "prompt", "max_tokens", "logprobs")
# Taken and without effect: they change no answer.
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Refused unless they ask for what is done anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "logit_bias": ({},), "modalities": (["text"],),
    "frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "audio": (), "prediction": (), "reasoning_effort": ("none",), "web_search_options": (), "verbosity": (),
}  # fmt: skip


class RequestError(MobiLlamaError):
    """A request that is not answered, as OpenAI's API says it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code, self.kind, self.headers = param, status, code, kind, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Options:
    """What chats and completions have in common."""

    sampling: Sampling
    choices: int
    max_tokens: int | None
    stops: tuple[str, ...]
    seed: int | None
    log_probabilities: int | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class ChatRequest:
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    options: Options


@dataclass(frozen=True)
class CompletionRequest:
    """``POST /v1/completions``."""

    prompts: list[str] | list[list[int]]
    options: Options


def read_body(content: bytes) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        RequestError: it is none, or holds NaN or an infinity.
    """

    def refuse(constant: str) -> NoReturn:
        raise RequestError(f"the body holds {constant}, which is no number in JSON")

    try:
        body = json.loads(content, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair, which is no character, fails here
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    return body


def parse_chat(body: dict[str, Any], model: str) -> ChatRequest:
    """Return a checked chat request.

    Raises:
        RequestError: naming the field.
    """
    _check_keys(body, _CHAT)
    _check_model(body, model)
    for key in ("max_completion_tokens", "max_tokens"):
        if key in body:
            most = _whole(body, key, 1, 2**31)
            if most is not None:
                break
    else:
        most = None
    wanted, top = _truth(body, "logprobs"), _whole(body, "top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        raise RequestError("top_logprobs goes with logprobs: true", "top_logprobs")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: is no list with at least one message", "messages")
    if len(messages) > MOST_MESSAGES:
        raise RequestError(f"messages: {len(messages)} of them; {MOST_MESSAGES} are the most", "messages")
    return ChatRequest(
        [_message(message, f"messages[{number}]") for number, message in enumerate(messages)],
        _options(body, most, (top or 0) if wanted else None),
    )


def parse_completion(body: dict[str, Any], model: str) -> CompletionRequest:
    """Return a checked completion request.

    Raises:
        RequestError: naming the field.
    """
    _check_keys(body, _COMPLETION)
    _check_model(body, model)
    most = _whole(body, "max_tokens", 1, 2**31)
    options = _options(body, 16 if most is None else most, _whole(body, "logprobs", 0, MOST_TOP))
    prompts = _prompts(body.get("prompt"))
    if not prompts or len(prompts) * options.choices > MOST_CHOICES:
        raise RequestError(f"prompt: {len(prompts)} prompts; give 1 to {MOST_CHOICES}, times n", "prompt")
    if not all(prompts):
        raise RequestError("prompt: is empty; give at least a character", "prompt")
    return CompletionRequest(prompts, options)


def _prompts(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if all(isinstance(part, str) for part in prompt):
            return prompt
        if all(type(part) is int for part in prompt):
            return [prompt]
        if all(isinstance(part, list) and all(type(token) is int for token in part) for part in prompt):
            return prompt
    raise RequestError("prompt: is no text, list of texts, or list of token ids", "prompt")


def _message(message: Any, place: str) -> Message:
    """Return a message with one text; its role is checked where the conversation becomes ids."""
    if not isinstance(message, dict):
        raise RequestError(f"{place}: is no object with role and content", place)
    for key in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(key):
            raise RequestError(f"{place}.{key}: is not offered here", f"{place}.{key}")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                where = f"{place}.content[{number}]"
                raise RequestError(f"{where}: is no part of the type 'text'; this model reads text only", where)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{place}.content: is no text", f"{place}.content")
    if content == "" and role == "user":
        raise RequestError(f"{place}.content: is empty", f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": content}  # type: ignore[dict-item]


def _options(body: dict[str, Any], max_tokens: int | None, top: int | None) -> Options:
    given = {key: _number(body, key) for key in _SAMPLING if body.get(key) is not None}
    for key, most in (("temperature", 2), ("top_k", 2**31), ("repetition_penalty", 10)):
        if given.get(key, 0) > most:
            raise RequestError(f"{key}: {given[key]} is more than {most}", key)
    try:
        defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
        sampling = Sampling(**defaults | given)
    except UsageError as error:
        field, reason = str(error).split(":", 1)
        key = field.replace("-", "_")
        raise RequestError(f"{key}:{reason}", key) from None
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise RequestError("stream_options: is no object", "stream_options")
    stream = _truth(body, "stream")
    if stream_options and not stream:
        raise RequestError("stream_options goes with stream: true", "stream_options")
    return Options(
        sampling=sampling,
        choices=_whole(body, "n", 1, MOST_CHOICES) or 1,
        max_tokens=max_tokens,
        stops=_stops(body.get("stop")),
        seed=_whole(body, "seed", -_MOST_SEED, _MOST_SEED),
        log_probabilities=top,
        stream=stream,
        include_usage=_truth(stream_options or {}, "include_usage"),
    )


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise RequestError(f"stop: is no text, or list of at most {MOST_STOPS} texts", "stop")
    if not all(isinstance(text, str) and 0 < len(text) <= MOST_STOP_LENGTH for text in stops):
        raise RequestError(f"stop: holds what is no text of 1 to {MOST_STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _number(body: Mapping[str, Any], key: str) -> float | int:
    value = body[key]
    if key == "top_k":
        return _whole(body, key, 0, 2**31) or 0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{key}: {value!r:.40} is no number", key)
    try:
        return float(value)
    except OverflowError:
        raise RequestError(f"{key}: is too large", key) from None


def _whole(body: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{key}: {value!r:.40} is no whole number from {least} to {most}", key)
    return value


def _truth(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{key}: {value!r:.40} is neither true nor false", key)
    return bool(value)


def _check_keys(body: Mapping[str, Any], known: Sequence[str]) -> None:
    for key, value in body.items():
        if key in known or key in _WITHOUT_EFFECT or value is None:
            continue
        if key not in _HARMLESS:
            raise RequestError(f"{key[:80]}: is no field of this request{did_you_mean(key[:80], known)}", key[:80])
        if value not in _HARMLESS[key]:
            raise RequestError(f"{key}: is not offered here; leave it out", key, code="unsupported_parameter")


def _check_model(body: Mapping[str, Any], model: str) -> None:
    name = body.get("model")
    if not isinstance(name, str):
        raise RequestError(f"model: is missing; '{model}' is served here", "model")
    if name != model:
        raise RequestError(
            f"model: '{name[:80]}' is not served here; '{model}' is", "model", status=404, code="model_not_found"
        )


def checked(function: Callable[[], Any], param: str) -> Any:
    """Return what a function returns; its complaints are those of a field.

    Raises:
        RequestError: the function raised a UsageError.
    """
    try:
        return function()
    except UsageError as error:
        raise RequestError(str(error), param) from None
