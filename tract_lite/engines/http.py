"""HTTP to one server: what may pass is tried again, and an error says what to do, in one line."""

import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity

# What a server may ask for, and what is waited unasked.
LONGEST_WAIT, LONGEST_BACK_OFF = 60.0, 20.0


class Unavailable(RuntimeError):
    """Nothing answers, or the server is too busy or broken to: a later try may go well."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class Refused(ValueError):
    """The server refuses what it is asked."""


class NoLogProbabilities(Refused):
    """The server refuses to give the log-probabilities that are asked for."""


class Connection:
    """Requests of JSON to the server at `url`, from any number of threads.

    `timeout`: seconds without a sign of life. `retries`: how often a request is sent again.
    `back_off`: seconds before the first time, about twice as many before each following one.
    Raises ValueError: `url` is no address.
    """

    def __init__(
        self, url: str, *, timeout: float = 120.0, retries: int = 4, back_off: float = 0.5, api_key: str | None = None
    ):
        try:
            valid = httpx.URL(url).scheme in ("http", "https") and httpx.URL(url).host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            raise ValueError(f"{url!r} is no server's address: it looks like http://127.0.0.1:8080")
        self.url = url.rstrip("/").removesuffix("/v1")
        # Behind idle connections, llama-server lets new ones wait for seconds.
        headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._client = httpx.Client(headers=headers, limits=httpx.Limits(max_connections=None))
        self._timeout = timeout
        self._stop = tenacity.stop_after_attempt(1 + retries)
        growing = tenacity.wait_exponential(multiplier=back_off, max=LONGEST_BACK_OFF)
        self._back_off = growing + tenacity.wait_random(0.0, back_off)

    def __str__(self) -> str:
        return f"the server at {self.url}"

    def get(self, path: str, timeout: float | None = None, **query: str) -> dict[str, Any] | None:
        """A page, asked for once; None where the server has no such page.
        Raises RuntimeError: the server does not answer, or keeps its pages to itself.
        """
        response = self._request("GET", path, timeout or self._timeout, params=query)
        if response.status_code in (401, 403, 429) or response.status_code >= 500:
            raise self._refusal(response)
        return _content(response) if response.is_success else None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, which is sent again while that may help.
        Raises Unavailable: all tries were in vain.
        Raises Refused: the server refuses what it is asked (`NoLogProbabilities` where it is that).
        Raises RuntimeError: the server can't be asked this at all.
        """
        again = tenacity.retry_if_exception_type(Unavailable)
        tries = tenacity.Retrying(retry=again, wait=self._wait, stop=self._stop, reraise=True)
        return tries(self._post, path, body)

    def close(self) -> None:
        self._client.close()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._request("POST", path, self._timeout, json=body)
        if not response.is_success:
            raise self._refusal(response)
        content = _content(response)
        if content is None:
            raise RuntimeError(f"{self} answers {path} with something else than JSON: check the address")
        return content

    def _wait(self, state: tenacity.RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after if isinstance(failure, Unavailable) else None
        return self._back_off(state) if asked is None else min(max(asked, 0.0), LONGEST_WAIT)

    def _request(self, method: str, path: str, timeout: float, **options: Any) -> httpx.Response:
        try:
            return self._client.request(method, self.url + path, timeout=timeout, **options)
        except httpx.TimeoutException as error:
            advice = "ask for less in parallel, or raise the time-out"
            raise Unavailable(f"{self} did not answer within {timeout:g} s: {advice}") from error
        except httpx.RequestError as error:
            raise Unavailable(f"{self} can't be reached ({error}): start it, or check the address") from error

    def _refusal(self, response: httpx.Response) -> Exception:
        status, reason = response.status_code, _reason(response)
        text = f"{self} answered HTTP {status}: {reason}"
        if "logprob" in reason:
            return NoLogProbabilities(text)
        if status == 429 or status >= 500:
            return Unavailable(text, _retry_after(response))
        if status in (401, 403):
            return RuntimeError(f"{text}; give the key that it wants as api_key")
        if status < 400 or status == 404:
            return RuntimeError(f"{text}; check the address and the model's name")
        return Refused(text)


def _retry_after(response: httpx.Response) -> float | None:
    """The wait in seconds that the server asks for, as a number or as a date."""
    value = response.headers.get("Retry-After", "")
    try:
        return float(value) if value.isdigit() else (parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _content(response: httpx.Response) -> dict[str, Any] | None:
    try:
        content = response.json()
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _reason(response: httpx.Response) -> str:
    """What the server says in its error, in one short line."""
    content = _content(response) or {}
    error = content.get("error") or content.get("detail") or content.get("message")
    error = error.get("message") if isinstance(error, dict) else error
    line = " ".join(str(error or response.text or response.reason_phrase).split())
    return line if len(line) <= 300 else f"{line[:300]} …"
