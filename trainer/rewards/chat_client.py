"""A client of an OpenAI-compatible chat endpoint: limited concurrency, a time limit, retries with
exponential backoff.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from ..config import JudgeConfig
from ..errors import ConfigError

RETRIED = frozenset({408, 429, *range(500, 600)})
"""Status codes after which a request is retried."""


class RequestFailed(Exception):
    """No reply after all retries, or an error that a retry would not change."""


@dataclass
class Traffic:
    """Statistics since ``clear``. seconds: duration of every attempt."""

    retries: int = 0
    seconds: list[float] = field(default_factory=list)

    def clear(self) -> None:
        self.retries = 0
        self.seconds.clear()


class ChatClient:
    """Sends requests to ``config.model`` at ``config.url``; use within ``async with``.

    A request that waits for its retry still counts as one of the ``concurrency`` requests, so an
    overloaded server receives fewer.

    Raises:
        ConfigError: the environment variable ``config.api_key_env`` is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config, self.traffic = config, Traffic()
        self.headers: dict[str, str] = {}
        if name := config.api_key_env:
            key = os.environ.get(name)
            if not key:
                raise ConfigError(
                    f"rewards.judge.api_key_env: expected a variable that holds the key, got {name!r}, which is unset"
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self._random = random.Random()  # separate, so that pauses do not change the run's random numbers

    async def __aenter__(self) -> ChatClient:
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        # The time limit (below) covers the whole request, not each read, so it also catches a slow stream.
        self._http = httpx2.AsyncClient(headers=self.headers, limits=limits, timeout=None)
        self._gate = asyncio.Semaphore(self.config.concurrency)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the reply to ``messages``.

        Raises:
            RequestFailed: with what was expected and what was received.
        """
        config = self.config
        body = {
            "model": config.model,
            "messages": list(messages),
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        async with self._gate:
            for attempt in range(config.retries + 1):
                begun = time.monotonic()
                reason, wait = "", 0.0
                try:
                    async with asyncio.timeout(config.timeout):
                        response = await self._http.post(f"{config.url.rstrip('/')}/chat/completions", json=body)
                except TimeoutError:
                    reason = f"no reply within {config.timeout:g} s (rewards.judge.timeout)"
                except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                    raise RequestFailed(f"expected a usable URL, got {config.url!r} ({error})") from error
                except httpx2.TransportError as error:
                    reason = f"no reply from {config.url} ({type(error).__name__}: {error})"
                else:
                    if response.status_code == 200:
                        return _content(response)
                    reason = f"expected status 200 from {config.url}, got {response.status_code}: {response.text[:200]!r}"
                    if response.status_code not in RETRIED:
                        raise RequestFailed(reason)
                    wait = _retry_after(response.headers.get("Retry-After"))
                finally:
                    self.traffic.seconds.append(time.monotonic() - begun)
                if attempt == config.retries:
                    raise RequestFailed(f"{reason}; {attempt + 1} tries")
                if wait > config.max_wait:
                    raise RequestFailed(f"{reason}; Retry-After: {wait:.0f} s, more than rewards.judge.max_wait")
                self.traffic.retries += 1
                pause = min(config.backoff * 2**attempt * self._random.uniform(0.5, 1.0), config.max_wait)
                await asyncio.sleep(max(pause, wait))
        raise AssertionError("unreachable: the last try returns or raises")


def _content(response: httpx2.Response) -> str:
    try:
        content: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RequestFailed(f"expected a chat completion with text, got {response.text[:200]!r}")
    return content


def _retry_after(value: str | None) -> float:
    """Seconds of the Retry-After header, given as seconds or as a date; 0 where it is missing or
    unreadable.
    """
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
