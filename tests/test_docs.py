"""README and docs: every command and Python block runs, links lead somewhere, messages exist."""

from __future__ import annotations

import ast
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import example
import pytest
import servers
from tiny import export_judge, make_llama, vocabulary_folder

from tract_lite import JudgeSpec, __main__ as command_line, parse_options, preset_for
from tract_lite.data.jsonl import read_json

ROOT = Path(__file__).parents[1]
README, DOCS, CONTRIBUTING = ROOT / "README.md", ROOT / "docs", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted(DOCS.glob("*.md"))]
# The second word behind a fence of shell commands, and why they are not run as they stand.
NOT_RUN = {
    "install": "installs, tests, or is `make demo`, which the fixture `demo_run` is",
    "gpu": "needs a GPU and models of the hub: each preset is run with a toy seed",
    "laptop": "trains a real seed model for long: in its place a toy is trained, and the real one elsewhere",
    "server": "needs ports and vLLM: options are parsed, and llama-server is a real one elsewhere",
}
OWN_ITEMS, HELD_OUT_ITEMS = 40, 20


class Block(NamedTuple):
    language: str
    tag: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    fences = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*fence) for fence in fences]


def commands_of(tag: str) -> list[list[str]]:
    """The words of every line in the blocks with this tag, in all pages."""
    lines = [
        line for page in PAGES for block in blocks_of(page) if block.tag == tag for line in block.text.splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines]


def write_own_files(folder: Path) -> None:
    """The files of a reader that the pages name."""
    with (folder / "my_scores.csv").open("w", newline="") as scores:
        with (folder / "my_texts.csv").open("w", newline="") as texts:
            rows, few = csv.writer(scores), csv.writer(texts)
            rows.writerow(["instruction", "response", "criteria", "score", "feedback"])
            few.writerow(["instruction", "response", "criteria"])
            for number, item in enumerate(example.make_items(OWN_ITEMS, 7)):
                record = item.record
                text = [record.instruction, record.response, record.rubric.criteria]
                rows.writerow([*text, record.score, record.feedback])
                if number < 3:
                    few.writerow(text)


@pytest.fixture(scope="module")
def clone(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a run's folder in it, of whose held-out items a few are kept."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "tract_lite", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    # The pages speak of the demo's; a quick run leaves the same files.
    shutil.copytree(quick_run, folder / "runs" / "demo")
    make_llama(folder / "instruct", vocabulary_folder("split digits"), context=600)
    export_judge("split digits", folder / "instruct", folder / "qwen2.5-7b-instruct-q4_k_m.gguf")
    held_out = folder / "runs" / "demo" / "held_out.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:HELD_OUT_ITEMS]))
    write_own_files(folder)
    return folder


def run(clone: Path, *command: str) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=clone, env={**os.environ, "PATH": places}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.training
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, clone: Path) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            run(clone, sys.executable, "-c", block.text)
        elif block.language == "bash" and block.tag in ("", "laptop"):
            text = block.text.replace("two_stage.py", "two_stage.py --seed-model toy") if block.tag else block.text
            run(clone, "bash", "-euo", "pipefail", "-c", text)
        elif block.language in ("csv", "json"):
            (clone / block.tag).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_of_a_known_kind(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks_of(page))
    for block in blocks_of(page):
        if block.language == "bash":
            assert not block.tag or block.tag in NOT_RUN
        else:
            assert block.language in ("python", "text") or Path(block.tag).suffix[1:4] in ("csv", "jso")


def test_commands_for_a_gpu_have_options_that_the_recipe_knows() -> None:
    commands = commands_of("gpu")
    assert len(commands) > 4
    for command in commands:
        options = parse_options(command[command.index("recipes/two_stage.py") + 1 :])
        assert preset_for(options).training


@pytest.mark.training
@pytest.mark.long
@pytest.mark.parametrize("preset", ["t4", "24gb"])
def test_a_command_for_a_gpu_goes_the_whole_way_with_a_toy_seed_model(preset: str, clone: Path) -> None:
    command = next(words for words in commands_of("gpu") if preset in words)
    seed_model = JudgeSpec.load(clone / "runs" / "demo" / "merged").base_model
    own = "--data my_scores.csv --template runs/demo/example/template.jinja --max-items 8 --max-new-tokens 64"
    run(clone, *command, *own.split(), "--seed-model", seed_model, "--out", f"runs/{preset}")
    assert (clone / "runs" / preset / "judge-q4_k_m.gguf").is_file()
    assert read_json(clone / "runs" / preset / "metrics.json")["counts"]["training_records"] == 8


@pytest.mark.training
@pytest.mark.long
def test_a_laptop_s_command_trains_a_real_seed_model_on_scores_alone(clone: Path) -> None:
    [command] = commands_of("laptop")
    [out] = [command[place + 1] for place, word in enumerate(command) if word == "--out"]
    run(clone, *command, "--columns", "feedback=", "--epochs", "1", "--max-items", "8", "--out", f"{out}_real")
    settings, counts = (read_json(clone / f"{out}_real" / name) for name in ("settings.json", "counts.json"))
    assert (settings["preset"], settings["seed_model"]) == ("laptop", "small")
    assert counts["scale"] == "1-5"
    assert (clone / f"{out}_real" / "judge-q8_0.gguf").stat().st_size > 100e6
    assert read_json(clone / f"{out}_real" / "metrics.json")["counts"]["direct"]["direct"] == 8


def test_commands_for_servers_have_options_that_the_command_line_knows() -> None:
    asked = [words for words in commands_of("server") if words[0] == "tract-lite"]
    assert len(asked) == 2
    for command in asked:
        assert command_line.parse(command[1:]).model.startswith("http://")


@pytest.mark.training
@pytest.mark.long
def test_the_documented_judging_with_llama_server_works(clone: Path) -> None:
    serve, judge = [words for words in commands_of("server") if "vllm" not in " ".join(words)][:2]
    model = clone / serve[serve.index("-m") + 1]
    slots, context = (int(serve[serve.index(name) + 1]) for name in ("-np", "-c"))
    with servers.llama_server(model, slots, context // slots) as url:
        run(clone, *[url if word.startswith("http://") else word for word in judge])
    with (clone / judge[judge.index("-o") + 1]).open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 3 and all(row["score"] and not row["error"] for row in rows)


def test_every_page_is_linked_from_the_readme_and_every_link_leads_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        assert all((page.parent / link).exists() for link in links), page
        if page == README:
            assert {README.parent / link for link in links} >= set(PAGES[1:])


def test_every_heading_that_is_linked_to_stands_in_its_page() -> None:
    """As GitHub names them: in small letters, blanks as hyphens, without other signs."""
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            there = (page.parent / link if link else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", there, re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in names, (page.name, link, anchor)


def test_the_pictures_of_the_readme_are_there_small_and_told_in_words() -> None:
    text = README.read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^\]]+)\]\((docs/[^)]+)\)", text)
    shown += [(words, path) for path, words in re.findall(r'<img src="(docs/[^"]+)"[^>]* alt="([^"]+)">', text)]
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {Path(path).name for _, path in shown}
    for words, path in shown:
        assert (ROOT / path).stat().st_size < 300e3 and len(words.split()) > 10, path
    [(words, path)] = [one for one in shown if one[1].endswith(".svg")]
    told = re.findall(r"\w+ \d\.\d+", words)
    assert len(told) >= 3 and all(figure in (ROOT / path).read_text(encoding="utf-8") for figure in told)


def test_the_files_named_in_the_readme_exist() -> None:
    (tree,) = [block.text for block in blocks_of(README) if block.language == "text"]
    folder, named = ROOT, []
    for line in tree.splitlines():
        names = [ROOT / line.split()[0]] if not line.startswith(" ") else []
        folder = names[0] if names else folder
        # Names and what they are stand two spaces apart.
        names = names or [folder / name for name in re.split(" {2,}", line.strip())[0].split(", ")]
        named += names
        assert all(path.is_dir() if line.split()[0].endswith("/") else path.is_file() for path in names), line
    assert len(named) > 10


def test_every_verb_of_a_page_is_one_of_the_command() -> None:
    lines = [line for page in PAGES for block in blocks_of(page) for line in block.text.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("tract-lite ")]
    assert {command[1] for command in commands} >= {"judge", "evaluate", "export", "report", "train", "reason", "merge"}
    for command in commands:
        # What the shell puts in may be several words.
        command_line.parse([word for word in command[1:] if word != "$ASKED"])


@pytest.mark.training
def test_the_readmes_table_is_that_of_the_demo(demo_run: Path) -> None:
    """Each figure lies in the range that the README gives, or near the one that it names."""
    figure = r"(0\.\d+)(?: to (0\.\d+))?"
    rows = re.findall(rf"^\| ([^|]+) \| {figure} \| {figure} \|$", README.read_text(), re.MULTILINE)
    measured = read_json(demo_run / "metrics.json")["rows"]
    assert len(rows) >= 6
    for name, *ends in rows:
        # The stage-1 judge trusts what it makes up: its figures wander most.
        margin = 0.1 if name.startswith("stage 1") else 0.05
        for (low, high), key in zip((ends[:2], ends[2:]), ("pearson", "rmse")):
            assert float(low) - margin <= measured[name][key] <= float(high or low) + margin, (name, key)


@pytest.mark.training
def test_the_page_on_run_folders_explains_every_file_and_number(quick_run: Path) -> None:
    page = (DOCS / "run_folder.md").read_text(encoding="utf-8")
    for path in quick_run.iterdir():
        name = next((known for known in ("judge-*.gguf", "*.run.json") if path.match(known)), path.name)
        assert f"`{name.removeprefix('*')}`" in page or path.is_dir() and f"`{name}/`" in page, name
    metrics = read_json(quick_run / "metrics.json")
    stage = read_json(quick_run / "stage2" / "stage.json")
    figures = {key for row in metrics["rows"].values() for key in row}
    parity = {key for of_file in metrics["parity"].values() for key in of_file} - {"records"}
    logged = {key for entry in stage["log"] for key in entry if not is_bookkeeping(key)}
    for name in figures | parity | logged | keys_of(metrics["counts"]):
        assert f"`{name}`" in page, name


def is_bookkeeping(key: str) -> bool:
    """What transformers adds at the end of each loop, about its own speed."""
    return bool(re.fullmatch(r"(train|eval)_(runtime|\w+_per_second)|train_loss|total_flos", key))


def keys_of(counts: dict[str, Any]) -> set[str]:
    nested = [set(value) for value in counts.values() if isinstance(value, dict)]
    return {key for key, value in counts.items() if isinstance(value, int)}.union(*nested)


def test_troubleshooting_names_messages_that_exist() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    own, _, others = page.partition("\n## Of other programs\n")
    named = re.findall(r"^### `(.+)`$", own, re.MULTILINE)
    known = set(messages())
    assert len(named) > 20 and others
    for message in named:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*?".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in known), message


def messages() -> Iterator[str]:
    """All string constants of the package and the recipes, with … for what is put in."""
    for path in [*(ROOT / "tract_lite").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[ds]|%\.\d+f", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
