"""Ids of the hub, and what to do where it does not give what they name."""

import os
import re
from typing import Iterator

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id on the hub, such as "mistralai/Mistral-7B-v0.3"."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII))


def why_not_fetched(name: str, error: BaseException, download: str = "hf download {}") -> str:
    """Why the hub did not give a model or data set, and what to do, in half a line.

    `error` is what a library of the hub raised: which kind it is, its causes tell.
    """
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    if "GatedRepoError" in kinds or "gated" in str(error):
        return "the hub asks for consent: give it on its page there, then `hf auth login`"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return "the hub does not show it: check the name or, if it is private, `hf auth login`"
    if kinds & {"PermissionError", "NotADirectoryError", "FileExistsError"}:
        return f"the hub's cache can't be written ({_first_line(error)}): HF_HOME names another place"
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "TransportError"}:
        on = ("1", "ON", "YES", "TRUE")
        switch = next((switch for switch in OFFLINE_SWITCHES if os.environ.get(switch, "").upper() in on), None)
        fault = f"{switch} is set, and the cache lacks it" if switch else "the hub can't be reached"
        return f"{fault}: fetch it where there is a network (`{download.format(name)}`), and name its folder"
    return f"the hub did not give it: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
