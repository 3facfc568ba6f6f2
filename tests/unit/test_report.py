"""The report: what is in its three files, and that they can be trusted and shown to anyone."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Metric
from kdrecipe.recipe.sections import Claim
from kdrecipe.report import plots
from kdrecipe.report.html import from_markdown, per_epoch
from kdrecipe.report.listen import Listening, aligned, encode
from kdrecipe.report.reading import read_log
from kdrecipe.report.write import assemble, write_report
from kdrecipe.score.scoring import Question, score
from kdrecipe.score.searches import score_searches
from kdrecipe_plugins.metrics.cer import Cer
from kdrecipe_plugins.metrics.wer import TextOptions, Wer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "small",
    "boats",
    "drift",
    "past",
    "an",
    "open",
    "harbour",
    "gate",
]
METRICS: dict[str, Metric] = {"wer": Wer(TextOptions()), "cer": Cer(TextOptions())}
ROBUSTNESS = {
    "metric": "wer",
    "utterances": 20,
    "conditions": {"clean": "as recorded", "joined": "joined"},
    "systems": {"teacher": {"clean": 0.1, "joined": 0.15}, "kd": {"clean": 0.0, "joined": 0.05}},
}
EVIL = '<script>alert("x")</script> & </td>'

# name: kind, parent, error rate, parameters, MB, real-time factor
SYSTEMS: dict[str, tuple[str, str | None, float, int, float, float]] = {
    "teacher": ("trained", None, 0.06, 11_300_000, 44.8, 0.0312),
    "scratch": ("trained", None, 0.33, 812_000, 3.41, 0.0051),
    "cr_ctc": ("trained", None, 0.29, 812_000, 3.41, 0.0052),
    "kd": ("distilled", "teacher", 0.22, 812_000, 3.41, 0.0051),
    "kd_unlabelled": ("distilled", "teacher", 0.15, 812_000, 3.41, 0.0050),
    "kd_int8": ("compressed", "kd", 0.225, 812_000, 1.12, 0.0043),
}
Hyps = dict[str, dict[int, dict[str, Path]]]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def say(path: Path, error_rate: float, seed: int, num_utterances: int) -> Path:
    references, noise = random.Random(0), random.Random(f"{error_rate} {seed}")
    rows = []
    for i in range(num_utterances):
        words = [references.choice(WORDS) for _ in range(references.randint(4, 18))]
        heard: list[str] = []
        for word in words:
            if noise.random() >= error_rate:
                heard.append(word)
            else:
                heard += noise.choice([[], [noise.choice(WORDS)], [noise.choice(WORDS)], [word, "uh"]])
        rows.append({"id": f"spk{i % 7}-{i:04}", "ref": " ".join(words), "hyp": " ".join(heard)})
    rows[0]["ref"] += f" {EVIL}"
    return write_jsonl(path, rows)


def make_inputs(
    directory: Path,
    *,
    seeds: tuple[int, ...] = (1, 2, 3),
    num_utterances: int = 40,
    splits: tuple[str, ...] = ("test",),
) -> tuple[dict[str, Any], Hyps, dict[str, dict[int, Path]]]:
    """What the stages before leave to the report, for six systems."""
    hyps: Hyps = {}
    logs: dict[str, dict[int, Path]] = {}
    for name, (kind, _, rate, *_) in SYSTEMS.items():
        for seed in seeds[:1] if name == "teacher" else seeds:
            for i, split in enumerate(splits):
                path = directory / f"hyps/{name}/seed{seed}/{split}.jsonl"
                hyps.setdefault(name, {}).setdefault(seed, {})[split] = say(
                    path, rate * (1 + 0.6 * i), seed, num_utterances
                )
            if kind != "compressed":
                rows: list[dict[str, Any]] = []
                for epoch in range(1, 31):
                    wobble = random.Random(f"{name}{seed}{epoch}").gauss(0, 0.01)
                    loss = 3.5 * np.exp(-epoch / 8) + rate + wobble
                    rows.append({"event": "step", "step": 10 * epoch, "epoch": epoch, "loss": loss})
                    dev = {"dev_loss": loss + 0.1, "dev_ter": min(1.0, rate + np.exp(-epoch / 6) + wobble)}
                    rows.append({"event": "epoch", "step": 10 * epoch, "epoch": epoch, **dev})
                rows.append({"event": "end", "step": 300, "epoch": 0, "dev_ter": 9.0})
                logs.setdefault(name, {})[seed] = write_jsonl(
                    directory / f"systems/{name}/seed{seed}/log.jsonl", rows
                )
    question = Question(
        teachers={"kd": "teacher", "kd_unlabelled": "teacher", "kd_int8": "teacher"},
        baselines={"kd": "scratch", "kd_unlabelled": "scratch"},
        compare=[("kd", "scratch"), ("kd", "cr_ctc"), ("kd_unlabelled", "kd"), ("kd_int8", "kd")],
        families={"kd": "kd", "kd_int8": "kd"},
    )
    speakers = {f"spk{i % 7}-{i:04}": f"spk{i % 7}" for i in range(num_utterances)}
    systems = [
        {
            "name": name,
            "kind": kind,
            "parent": parent,
            "seeds": list(hyps[name]),
            "params": params,
            "size_mb": size_mb,
            "rtf": {"median": rtf, "p95": 1.7 * rtf},
            "peak_rss_mb": 60 + size_mb,
            "runtime": "sherpa-onnx 1.12.1, 1 thread, " + ("int8" if kind == "compressed" else "fp32"),
            "parity": {
                "onnx_ctc": {
                    "num_utterances": 50,
                    "fp32": {"max_log_prob_diff": 2.1e-5, "token_error": 0.0, "wer": 0.2},
                }
            },
            "compression": [{"name": "int8_dynamic", "options": {}, "report": {"int8_share": 0.97}}]
            if kind == "compressed"
            else [],
            "train": {}
            if kind == "compressed"
            else {"epochs": 30, "steps": 300, "seconds": 412.0, "audio_s_per_s": 187.3},
        }
        for name, (kind, parent, _, params, size_mb, rtf) in SYSTEMS.items()
    ]
    data = {
        "recipe": {
            "name": "an4/kd",
            "path": "recipes/an4/kd",
            "corpus": "an4",
            "command": "./run.sh recipes/an4/kd --set corpus.root=/data/corpora/an4",
            "seeds": list(seeds),
            "profile": None,
            "git": "0123abcd4567",
            "date": "2026-01-15",
            "machine": {"cpu": "Some CPU @ 2.5 GHz", "cores": 2, "memory_gb": 16, "hostname": "anna-laptop"},
            "versions": {"kdrecipe": "0.1.0", "torch": "2.11.0", "python": "3.11.7"},
        },
        "corpus_summary": {
            "splits": {
                "train": {"utterances": 843, "speakers": 66, "hours": 0.6543},
                "test": {"utterances": num_utterances, "speakers": 7, "hours": 0.05},
            },
            "left_out": [
                {"id": "a", "reason": "empty text"},
                {"id": "b", "reason": "empty text"},
                {"id": "c", "reason": "no audio"},
            ],
            "notes": ["25 of 99 test sentences occur in train"],
        },
        "systems": systems,
        "scores": {**score(hyps, METRICS, question, speakers=speakers), "robustness": ROBUSTNESS},
        "searches": make_searches(directory, hyps),
        "sections": [
            {
                "title": "From a plugin",
                "markdown": f"Some **bold** words.\n\n| a | b |\n|---|--:|\n| x | 1 |\n\n- {EVIL}",
            }
        ],
        "claims": [
            Claim(
                text=f"Small {EVIL}", system="kd", figure="params_ratio", of="teacher", value=0.25
            ).model_dump(),
            Claim(
                text="A tenth of the words are wrong",
                system="kd",
                figure="wer",
                value=10,
                on="LibriSpeech test-clean",
                source="an article",
            ).model_dump(),
            Claim(text="Fast on a phone").model_dump(),
        ],
    }
    return data, hyps, logs


def make_searches(directory: Path, hyps: Hyps) -> list[dict[str, Any]]:
    """A second search of one system, a bit better than what it says otherwise."""
    searches: dict[str, dict[str, Any]] = {
        "greedy": {"decoder": "ctc_greedy", "options": {}, "lm": False, "head": "ctc", "rtf": 0.01},
        "beam": {
            "decoder": "ctc_prefix_beam",
            "options": {"beam": 8},
            "lm": False,
            "head": "ctc",
            "rtf": 0.03,
        },
    }
    better: dict[int, dict[str, Path]] = {}
    for seed, splits in hyps["scratch"].items():
        for split, path in splits.items():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [row | {"hyp": row["ref"]} if i % 3 == 0 else row for i, row in enumerate(rows)]
            file = directory / f"hyps/scratch/seed{seed}/beam/{split}.jsonl"
            better.setdefault(seed, {})[split] = write_jsonl(file, rows)
    files = {"scratch": {"greedy": hyps["scratch"], "beam": better}}
    rows = score_searches(files, {"scratch": searches}, METRICS)
    return [{**row, **searches[row["search"]]} for row in rows]


def tone(split: str, utterance: str) -> tuple[np.ndarray, int]:
    """A second of sound that differs between utterances."""
    pitch = 200 + 7 * sum(map(ord, utterance)) % 600
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(16000) / 16000), 16000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("report")
    inputs = make_inputs(directory)
    write_report(*inputs, directory / "out", audio=tone, listening=Listening(per_pair=6))
    return directory / "out", inputs


def test_results_schema(made: tuple[Path, Any]) -> None:
    results = json.loads((made[0] / "results.json").read_text())
    assert [s["name"] for s in results["systems"]] == list(SYSTEMS)
    for system in results["systems"]:
        assert {
            "kind",
            "parent",
            "seeds",
            "params",
            "size_mb",
            "rtf",
            "peak_rss_mb",
            "splits",
        } <= system.keys()
        for metric in ("wer", "cer"):
            found = system["splits"]["test"][metric]
            assert found["ci95"][0] <= found["mean"] <= found["ci95"][1]
            assert (found["std"] is None) == (len(system["seeds"]) == 1)
        assert ("gap_recovered" in system) == (system["kind"] == "distilled")
    kd = results["systems"][3]
    assert 0 < kd["gap_recovered"] < 1
    assert kd["splits"]["test"]["gap_recovered"]["baseline"] == "scratch"
    assert kd["fidelity"]["teacher"] == "teacher"
    assert len(results["comparisons"]) == 4
    assert "fractions" in str(results["units"])


def test_reading_follows_the_figures(made: tuple[Path, Any]) -> None:
    results = json.loads((made[0] / "results.json").read_text())
    said = {item["text"]: item["verdict"] for item in results["reading"]}
    better = next(text for text in said if text.startswith("**kd is better than scratch**"))
    assert said[better] == "better"
    wer = {s["name"]: s["splits"]["test"]["wer"]["mean"] for s in results["systems"]}
    assert f"{100 * wer['scratch']:.2f} → {100 * wer['kd']:.2f} % WER" in better
    assert "p < 0.001" in better or "p = 0.00" in better
    assert any(text.startswith("kd recovers") for text in said)
    assert any(
        text.startswith("kd_int8 takes 1.12 MB where kd takes 3.41 MB; their speeds differ by no more than")
        for text in said  # 1.2 times: two runs of one model are that far apart
    )
    assert any("Fewer than three seeds of teacher: intervals and p-values leave out" in text for text in said)


def test_reading_turns_with_the_figures(made: tuple[Path, Any]) -> None:
    data = dict(made[1][0])

    def verdicts(**changes: Any) -> tuple[str, str]:
        found = {"split": "test", "metric": "wer", "a": "kd", "b": "scratch", "a_mean": 0.2, "b_mean": 0.3}
        found |= {"difference": -0.1, "ci95": [-0.12, -0.08], "p": 0.0001, "seed_pairs": [9, 0, 9]} | changes
        item = assemble(data | {"comparisons": [found]})["reading"][0]
        return item["verdict"], item["text"]

    assert verdicts()[0] == "better"
    assert "33 % fewer errors" in verdicts()[1]
    assert "Every seed agrees (9 of 9 pairs)" in verdicts()[1]
    assert verdicts(p=0.06)[0] == "same"
    assert "anything from −12.00 to +1.00 points is possible" in verdicts(p=0.06, ci95=[-0.12, 0.01])[1]
    verdict, text = verdicts(p=0.01, p_adjusted=0.06)
    assert verdict == "same"
    alone = "alone, this comparison has p = 0.010 and −12.00 to −8.00 points."
    assert text.endswith(f"p = 0.060 after correction for the number of comparisons; {alone}")
    equal = verdicts(a_mean=0.3, difference=0.0, ci95=[0.0, 0.0], p=1.0)[1]
    assert equal.endswith("p = 1.00; the two make equally many errors throughout.")
    verdict, text = verdicts(a_mean=0.3, b_mean=0.2, difference=0.1, seed_pairs=[3, 6, 9])
    assert verdict == "worse"
    assert "kd is worse than scratch" in text
    assert "it holds in 6 of 9 pairs" in text
    paired = verdicts(seed_pairs=None, seeds_won=[3, 0, 3])[1]
    assert "Every seed agrees (3 of 3)." in paired
    assert "it holds in 2 of 3, " in verdicts(seed_pairs=None, seeds_won=[2, 0, 3])[1], "one is even"
    assert "seeds" not in paired, "three of each"
    text = verdicts(b="teacher")[1]
    assert text.endswith(" That is about these models: fewer than three seeds of teacher.")


def test_reading_names_rows_that_other_code_made() -> None:
    cores = {"a": ["1"], "b": ["1"], "c": ["1", "2"], "d": ["not recorded"]}
    systems = [{"name": name, "core": core, "seeds": [1, 2]} for name, core in cores.items()]
    data = {"recipe": {"name": "x"}, "systems": systems}
    [said] = [r["text"] for r in assemble(data)["reading"] if "kdrecipe's code" in r["text"]]
    assert said.startswith("Made by another version of kdrecipe's code than the other rows: c and d. ")
    data["systems"] = systems[:2]
    assert not [r for r in assemble(data)["reading"] if "code" in r["text"]]


def test_reading_warns_of_what_is_missing() -> None:
    split = {"wer": {"mean": 0.2, "std": None, "ci95": [0.1, 0.3]}, "gap_recovered": None}
    systems: list[dict[str, Any]] = [
        {
            "name": "kd",
            "kind": "distilled",
            "parent": "t",
            "seeds": [1],
            "splits": {"test": split},
            "size_mb": 4,
            "rtf": 0.01,
        },
        {
            "name": "kd2",
            "kind": "distilled",
            "parent": "t",
            "seeds": [1, 2],
            "splits": {"test": {"wer": split["wer"]}},
        },
        {
            "name": "small",
            "kind": "compressed",
            "parent": "kd",
            "seeds": [1, 2],
            "size_mb": 2,
            "rtf": {"median": 0.02},
        },
    ]
    said = [item["text"] for item in assemble({"recipe": {"name": "x"}, "systems": systems})["reading"]]
    assert said == [
        "kd has no gap to recover on test: its teacher is no better than its baseline.",
        "small takes 2 MB where kd takes 4 MB, and is slower: 0.50 times the speed.",
        "Fewer than three seeds of kd, kd2 and small: "
        "intervals and p-values leave out how far another seed would move these figures.",
        "Not tested against any other system: kd and kd2.",
        "No baseline of the same model and data, without a teacher, beside kd2.",
    ]


def test_searches_and_claims_are_shown(made: tuple[Path, Any]) -> None:
    results = json.loads((made[0] / "results.json").read_text())
    assert [(row["system"], row["search"]) for row in results["searches"]] == [
        ("scratch", "greedy"),
        ("scratch", "beam"),
    ]
    assert any(item["text"].startswith("**Search by beam is better than by") for item in results["reading"])
    ratio, rate, other = results["claims"]
    assert ratio["measured"] == pytest.approx(812 / 11300, abs=1e-6)
    assert rate["measured"] == pytest.approx(
        100 * results["systems"][3]["splits"]["test"]["wer"]["mean"], abs=1e-3
    )
    assert rate["measured_on"] == "an4 test"
    assert "another test set" in rate["note"]
    assert other["note"] == "not measured: nothing here measures it"
    text, page = ((made[0] / name).read_text() for name in ("RESULTS.md", "report.html"))
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[:4] == [
        "What the numbers say",
        "Claims beside what was measured",
        "Systems on test",
        "Searches on test, bundles in torch",
    ]
    assert re.search(r"^\| scratch +\| beam +\|.* 0\.0300 \|$", text, re.MULTILINE)
    assert "- beam: ctc_prefix_beam, beam 8" in text
    assert "Claimed in: an article." in text
    for title in titles[:4]:
        assert f">{title}</h2>" in page
    assert "10 % WER on LibriSpeech test-clean" in text
    assert '<td class="prose">' in page


def test_robustness_is_shown_beside_the_clean_utterances(made: tuple[Path, Any]) -> None:
    text, page = ((made[0] / name).read_text() for name in ("RESULTS.md", "report.html"))
    section = text[text.index("## Robustness") :]
    assert "WER % of 20 utterances" in section
    assert re.search(r"^\| system +\| as recorded +\| +joined +\|$", section, re.MULTILINE)
    assert re.search(r"^\| teacher +\| +10.00 +\| +15.00 \(×1.50\) +\|$", section, re.MULTILINE)
    assert re.search(r"^\| kd +\| +0.00 +\| +5.00 \(–\) +\|$", section, re.MULTILINE)
    assert ">Robustness</h2>" in page


def test_markdown(made: tuple[Path, Any]) -> None:
    text = (made[0] / "RESULTS.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    for name, (kind, *_) in SYSTEMS.items():
        assert any(re.match(rf"\| {name} +\| {kind} ", line) for line in table)
    assert "25 of 99 test sentences occur in train" in text
    varied = "Intervals and p-values: variance over 7 speakers with their 40 utterances, and over 3 seeds; "
    assert re.search(rf"^40 utterances by 7 speakers, \d+ words. {varied}seeds of systems with", text, re.M)
    assert "as crossed random effects (Clark 1973)" in text
    assert re.search(r"\| kd +\| scratch +\|.* \d of 9 pairs \|", text), "independent seeds"
    assert re.search(r"\| kd_int8 +\| kd +\|.* \d of 3 \|", text), "paired seeds"
    assert "2 × empty text" in text
    assert "Nothing was left out" not in text
    assert "run.sh recipes/an4/kd --set corpus.root=…/an4" in text
    assert "torch 2.11.0" in text
    assert "0123abcd4567" in text
    widths: dict[int, set[int]] = {}
    for number, line in enumerate(text.splitlines()):
        if line.startswith("|") and "From a plugin" not in text[: text.index(line)]:
            start = max(
                i for i, other in enumerate(text.splitlines()[: number + 1]) if not other.startswith("|")
            )
            widths.setdefault(start, set()).add(len(line))
    assert widths
    assert all(len(found) == 1 for found in widths.values()), "columns line up on a terminal"


def test_nothing_local_leaks(made: tuple[Path, Any]) -> None:
    for file in ("results.json", "RESULTS.md", "report.html"):
        text = (made[0] / file).read_text()
        assert "anna-laptop" not in text
        assert "/data/corpora" not in text
        assert str(made[0].parent) not in text


class _Page(HTMLParser):
    """Counts tags, keeps addresses and ids, and checks nesting."""

    void = {"meta", "input", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone(made: tuple[Path, Any]) -> None:
    text = (made[0] / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert all(address.startswith(("#", "data:audio/")) for address in page.addresses)
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)", text)
    assert page.tags.count("svg") == 5  # size, time, bars, two curves
    assert page.tags.count("audio") >= 6
    assert len(page.ids) == len(set(page.ids))
    links = {address[1:] for address in page.addresses if address.startswith("#")}
    assert links <= set(page.ids)


def test_page_escapes_what_people_said(made: tuple[Path, Any]) -> None:
    text = (made[0] / "report.html").read_text()
    assert EVIL not in text
    assert "<script>alert" not in text
    assert _Page(text).tags.count("script") == 1


def test_edits_are_marked_on_the_page(tmp_path: Path) -> None:
    words, errors = aligned("one <b> three", "one <i> three four")
    assert errors == 2
    edits = [("equal", "one", "one"), ("substitute", "<b>", "<i>"), ("equal", "three", "three")]
    assert [(w.edit, w.was, w.now) for w in words] == [*edits, ("insert", "", "four")]
    said = {"teacher": "one <i> three four", "kd": "one three"}
    hyps: Hyps = {}
    for name, hyp in said.items():
        row = {"id": "u1", "ref": "one <b> three", "hyp": hyp}
        hyps[name] = {1: {"test": write_jsonl(tmp_path / f"{name}.jsonl", [row])}}
    systems = [{"name": "teacher"}, {"name": "kd", "kind": "distilled", "parent": "teacher"}]
    write_report({"recipe": {"name": "x"}, "systems": systems}, hyps, {}, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    unseen = '<span class="unseen"> (instead of &lt;b&gt;)</span>'
    substituted = f'<span class="sub" title="instead of &lt;b&gt;">&lt;i&gt;{unseen}</span>'
    assert f"<td>one {substituted} three <ins>four</ins></td>" in text
    assert "<td>one <del>&lt;b&gt;</del> three</td>" in text


def test_every_system_is_on_the_page(made: tuple[Path, Any]) -> None:
    text = (made[0] / "report.html").read_text()
    for name in SYSTEMS:
        assert f'<th scope="row">{name}</th>' in text
        assert f'data-system="{name}"' in text


def test_deterministic(made: tuple[Path, Any], tmp_path: Path) -> None:
    data, hyps, logs = made[1]
    write_report(data, hyps, logs, tmp_path, audio=tone, listening=Listening(per_pair=6))
    for file in ("results.json", "RESULTS.md", "report.html"):
        assert (tmp_path / file).read_bytes() == (made[0] / file).read_bytes()


def test_audio_budget(made: tuple[Path, Any], tmp_path: Path) -> None:
    size = len(encode(*tone("test", "spk0-0000")))
    data, hyps, logs = made[1]
    write_report(
        data, hyps, logs, tmp_path, audio=tone, listening=Listening(per_pair=6, max_audio_mb=2.5 * size / 1e6)
    )
    page = _Page((tmp_path / "report.html").read_text())
    assert page.tags.count("audio") == 2
    assert "have no audio in this page" in (tmp_path / "report.html").read_text()


def test_audio_survives_encoding() -> None:
    samples = np.stack([tone("test", "x")[0]] * 2, axis=1)
    for rate in (16000, 12345):  # MP3 has no such rate
        head, packed = encode(samples, rate).split(",")
        heard, read_rate = soundfile.read(io.BytesIO(base64.b64decode(packed)))
        assert head == ("data:audio/mpeg;base64" if rate == 16000 else "data:audio/flac;base64")
        assert read_rate == rate
        assert heard.ndim == 1
        assert abs(len(heard) - len(samples)) < 4000
        assert 0.1 < np.abs(heard).max() < 0.5


def test_little_is_enough(tmp_path: Path) -> None:
    """One system that was only trained: no hypotheses, logs, sizes or comparisons."""
    data = {"recipe": {"name": "x"}, "systems": [{"name": "only"}]}
    write_report(data, {}, {}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["systems"][0]["size_mb"] is None
    assert "# Results of x" in (tmp_path / "RESULTS.md").read_text()
    assert "No system here was made from another" in (tmp_path / "report.html").read_text()


def test_two_splits_and_several_teachers(tmp_path: Path) -> None:
    data, hyps, logs = make_inputs(
        tmp_path, seeds=(1,), num_utterances=12, splits=("test_clean", "test_other")
    )
    data["systems"][3]["parent"] = ["teacher", "cr_ctc"]
    write_report(data, hyps, logs, tmp_path / "out")
    text = (tmp_path / "out/RESULTS.md").read_text()
    assert "## Systems on test_clean" in text
    assert "## Systems on test_other" in text
    assert "teacher, cr_ctc" in text
    assert "<option>test_other</option>" in (tmp_path / "out/report.html").read_text()


def test_numbers_json_has_not() -> None:
    data = {
        "recipe": {"name": "x"},
        "systems": [{"name": "a", "size_mb": float("nan"), "params": np.int64(3)}],
    }
    system = assemble(data)["systems"][0]
    assert system["size_mb"] is None
    assert json.dumps(system["params"]) == "3"


def test_names_must_be_given_and_differ() -> None:
    with pytest.raises(KdrecipeError, match="same name: a"):
        assemble({"recipe": {"name": "x"}, "systems": [{"name": "a"}, {"name": "a"}]})
    with pytest.raises(KdrecipeError, match="no name"):
        assemble({"recipe": {"name": "x"}, "systems": [{"kind": "trained"}]})


def test_training_logs(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "log.jsonl",
        [{"event": "step", "epoch": 1, "loss": 2.0}, {"event": "step", "epoch": 1, "loss": 4.0}],
    )
    with open(path, "a") as file:
        file.write('{"event": "step", "epo')  # killed while writing
    log = read_log(path)
    log.append({"event": "step", "epoch": 2, "loss": float("nan")})
    log.append({"event": "end", "epoch": 3, "loss": 1.0})
    assert per_epoch(log, "loss") == [(1, 3)]
    assert read_log(tmp_path / "absent") == []


def test_markdown_of_plugins(tmp_path: Path) -> None:
    markdown = (
        "# Title\ntext `a < b` and **more**\n\n- one\n- two\n\n```\nx <= y\n```\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |"
    )
    kinds = [type(block).__name__ for block in from_markdown(markdown)]
    assert kinds == ["Heading", "str", "list", "Code", "Table"]
    sections = [{"title": "Of a plugin", "markdown": markdown}]
    data = {"recipe": {"name": "x"}, "systems": [{"name": "only"}], "sections": sections}
    write_report(data, {}, {}, tmp_path)
    text = (tmp_path / "report.html").read_text()
    html = re.sub(r">\s+<", "><", text)
    assert "<h3>Title</h3><p>text <code>a &lt; b</code> and <strong>more</strong></p>" in html
    assert "<ul><li>one</li><li>two</li></ul>" in html
    assert "<pre><code>x &lt;= y</code></pre>" in html
    assert '<td class="number">2</td>' in html


def test_plots_bear_odd_input() -> None:
    one = plots.Point("only & one", "odd", 0.0, [0.0, 0.0], 1.0)
    for drawing in (
        plots.cost_plot([one], "size, MB", "a"),
        plots.rate_bars([one], "b"),
        plots.curves({"x": [[(1, 2.0)]]}, "loss", "c"),
    ):
        assert drawing.startswith("<svg role=")
        assert "#fd000" not in drawing
        assert "only & one" not in drawing
    same = [plots.Point(f"system{i}", "trained", 0.2, [0.1, 0.3], 5.0) for i in range(12)]
    assert all(p.name in plots.cost_plot(same, "size, MB", "d") for p in same)


def test_the_pareto_front_leaves_out_what_another_beats() -> None:
    rates = {"small": (1.0, 0.3), "worse": (2.0, 0.4), "equal": (2.0, 0.3), "large": (4.0, 0.1)}
    points = [plots.Point(name, "trained", rate, cost=cost) for name, (cost, rate) in rates.items()]
    assert [p.name for p in plots.front(points)] == ["small", "large"]
