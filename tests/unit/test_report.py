"""The study's report: complete in itself, tolerant of gaps, never kinder than the truth."""

from __future__ import annotations

import base64
import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from consilium_common.report import curves, wording
from consilium_common.report.content import (
    AttackerBound,
    Egress,
    LedgerOutcome,
    NoisyScore,
    Picture,
    PlanSection,
    PrivacyReport,
    RoundReport,
    Score,
    SiteEpsilon,
    SiteReport,
    StudyReport,
)
from consilium_common.report.study_report import render_study_report, score_tables

# The smallest PNG: one transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SITES = ("northfield", "riverside", "st-anna")
BEGIN = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)


def full(**changes: Any) -> StudyReport:
    """A report with every part, and ``changes``."""
    values: dict[str, Any] = {
        "name": "demo-liver",
        "title": "Liver in CT",
        "digest": "ab" * 32,
        "banner": "Everything on one machine.",
        "plan": (PlanSection(title="What is trained", lines=("A small UNet.",)),),
        "rounds_planned": 3,
        "started": BEGIN,
        "ended": BEGIN + timedelta(seconds=192),
        "created": BEGIN + timedelta(seconds=200),
        "sites": tuple(
            SiteReport(
                name=name,
                state="finished",
                cohort=10,
                rounds=3,
                device="cpu",
                epsilon=SiteEpsilon(
                    pld=7.0912, prv=7.095, rdp=8.1, delta=1e-3, spent=7.0912, budget=10
                ),
                ledger=LedgerOutcome(verified=True, entries=7, head="cd" * 32),
                egress=Egress(bytes_out=71_292, messages=9, refused=0),
            )
            for name in SITES
        ),
        "rounds": tuple(
            RoundReport(
                number=number,
                seconds=1.5,
                replied=SITES if number != 2 else SITES[:2],
                missed=() if number != 2 else SITES[2:],
                epsilon=dict.fromkeys(SITES, 2.3 * number),
            )
            for number in (1, 2, 3)
        ),
        "scores": (
            Score(site="northfield", values={"liver": 0.8, "tumour": 0.2}, cases=4),
            Score(site="st-anna", values={"liver": 0.7, "tumour": None}, cases=3),
            Score(values={"liver": 0.76, "tumour": 0.2}, cases=7),
        ),
        "privacy": PrivacyReport(
            threat_model="the aggregator and the other sites",
            sampling_rate=0.5,
            clip_norm=0.1,
            noise_multiplier=2.49,
            steps=30,
            delta=1e-3,
            attacker_bounds=(AttackerBound(false_positive_rate=0.01, true_positive_rate=0.241),),
        ),
        "pictures": (Picture(png=PNG, caption="A slice.", site="northfield"),),
        "notes": ("Few patients.",),
        "versions": {"consilium": "0.1.0"},
    }
    return StudyReport(**{**values, **changes})


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; collects texts, tags and references."""

    _VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(report: StudyReport) -> Page:
    return Page(render_study_report(report))


def test_a_full_report_says_everything() -> None:
    text = page(full()).text
    for words in (
        "Liver in CT",
        "Everything on one machine.",
        "2026-03-01 09:33 UTC",
        "3 min 12 s",
        "0.760",
        "northfield",
        "without st-anna",
        "ε of this study",
        "7.10",
        "add or remove one patient",
        "the aggregator and the other sites",
        "σ = 2.49",
        "24.1 %",
        "✓ verified",
        "71.3 kB",
        "A small UNet.",
        "Few patients.",
        "differs by at most 0.004",
        "ab" * 32,
    ):
        assert words in text, words


def test_a_report_of_nothing_but_a_name_is_a_page() -> None:
    report = page(StudyReport(name="tiny"))
    assert "tiny" in report.text
    assert not [tag for tag, _ in report.tags if tag in ("table", "img", "section")]


@pytest.mark.parametrize(
    "missing",
    [
        {"pictures": ()},
        {"privacy": None},
        {"scores": ()},
        {"rounds": ()},
        {"plan": (), "digest": ""},
        {"started": None, "ended": None, "created": None},
        {"sites": (SiteReport(name="alone"),)},
        {"rounds": (RoundReport(number=1),)},
        {"rounds_planned": None, "notes": (), "versions": {}},
    ],
)
def test_missing_parts_leave_no_trace(missing: dict[str, Any]) -> None:
    report = page(full(**missing))
    assert "None" not in report.text
    assert "nan" not in report.text.split()


def test_the_file_needs_and_loads_nothing_else() -> None:
    html = render_study_report(full())
    report = Page(html)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in report.tags}
    for _, attributes in report.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    policies = [a for _, a in report.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policies[0]["content"] or "")
    css = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in css and "url(" not in css
    for image in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html):
        svg = base64.b64decode(image).decode()
        assert "<script" not in svg
        assert not re.search(r'href="(?!#)', svg)


def test_equal_reports_are_equal_files() -> None:
    assert render_study_report(full()) == render_study_report(full())


@settings(max_examples=15, deadline=None)
@given(
    st.text(st.sampled_from("<>\"'&{}%$\\x/ ") | st.characters(min_codepoint=32, max_codepoint=126))
)
def test_text_from_outside_is_never_markup(text: str) -> None:
    nasty = f"{text}$\\frac$<script>alert(1)</script>{{{{ 7 * 7 }}}}<img src=x>"
    report = page(
        full(
            title=nasty,
            banner=nasty,
            audience=nasty,
            plan=(PlanSection(title=nasty, lines=(nasty,)),),
            sites=(
                SiteReport(
                    name=nasty,
                    state=nasty,
                    device=nasty,
                    ledger=LedgerOutcome(verified=False, head=nasty, detail=nasty),
                ),
            ),
            rounds=(RoundReport(number=1, missed=(nasty,), figures={nasty: {nasty: 1.0}}),),
            scores=(Score(site=nasty, metric=nasty, values={nasty: 0.5, "b": 0.5}),),
            pictures=(Picture(png=PNG, caption=nasty, site=nasty),),
            notes=(nasty,),
            versions={nasty: nasty},
        )
    )
    assert "script" not in {tag for tag, _ in report.tags}
    assert not [a for tag, a in report.tags if tag == "img" and a["src"] == "x"]
    assert "{{ 7 * 7 }}" in report.text


def test_a_broken_ledger_is_said_first() -> None:
    broken = SiteReport(
        name="riverside",
        ledger=LedgerOutcome(verified=False, entries=9, detail="Entry 7 does not fit its hash."),
    )
    text = page(full(sites=(*full().sites[:1], broken))).text
    first = text.index("The ledger of riverside did not verify.")
    assert first < text.index("Ledgers verified") < text.index("✗ broken")
    assert "1 of 2" in text
    assert text.count("Entry 7 does not fit its hash.") == 2
    assert "did not verify" not in page(full()).text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("running", "still running: 3 rounds of 3 so far"),
        ("stopped", "was stopped after 3 rounds of 3"),
        ("failed", "did not succeed"),
    ],
)
def test_an_unfinished_study_says_so(status: str, words: str) -> None:
    assert words in page(full(status=status)).text
    assert words not in page(full()).text


def test_a_private_study_explains_why_there_are_no_losses() -> None:
    sentence = "Losses and metrics of a private study stay at the sites"
    assert sentence in page(full()).text
    rounds = (RoundReport(number=1, figures={"loss": {"": 0.7}}),)
    open_study = page(full(rounds=rounds, privacy=None, sites=(SiteReport(name="a"),)))
    assert sentence not in open_study.text
    assert "no differential privacy in this study" in open_study.text
    assert "0.700" in open_study.text


def test_released_scores_are_shown_with_the_error_of_their_noise() -> None:
    shown = [
        {"rounds_done": 0, "score": 0.71, "standard_error": 0.052, "patients": 48},
        {"rounds_done": 20, "score": 1.02, "standard_error": 0.052, "patients": 48},
    ]
    scores = tuple(NoisyScore.of({**row, "sites": dict.fromkeys(SITES)}) for row in shown)
    private = full().privacy
    assert private is not None
    sites = tuple(
        site.model_copy(update={"epsilon": site.epsilon.model_copy(update={"evaluation": 0.5})})
        for site in full().sites
        if site.epsilon is not None
    )
    report = full(
        noisy_scores=scores,
        sites=sites,
        privacy=private.model_copy(update={"evaluations": 2, "evaluation_noise": 3.99}),
    )
    text = page(report).text
    assert "starting model .71 ± .05 3 48" in text
    assert "after round 20 1.02 ± .05 3 48" in text
    assert "standard error of that noise" in text
    assert "ε of tests" in text
    assert "2 evaluations, each a Gaussian query of its own" in text
    assert "noise of standard deviation 3.99" in text
    assert "Threat model the aggregator and the other sites" in text
    # In short, at the top: the last one.
    assert text.index("1.02 ± .05 after round 20") < text.index("starting model")
    assert "±" not in page(full()).text


def test_many_rounds_are_folded_away() -> None:
    rounds = tuple(RoundReport(number=n, seconds=0.1, replied=("a",)) for n in range(1, 301))
    folded = [a for tag, a in page(full(rounds=rounds)).tags if tag == "details"]
    unfolded = [a for tag, a in page(full()).tags if tag == "details"]
    assert "open" not in folded[0]
    assert "open" in unfolded[0]


def test_a_mean_is_over_the_classes_that_are_there() -> None:
    (table,) = score_tables(
        [
            Score(values={"a": 0.4, "b": 0.6}),
            Score(site="x", values={"a": 0.5, "b": None}),
            Score(site="y", values={"b": math.nan}),
        ]
    )
    assert [row.site for row in table.rows] == ["x", "y", "All sites"]
    assert [row.mean for row in table.rows] == [0.5, None, 0.5]
    assert table.rows[1].values == (None, None)


def test_metrics_have_tables_of_their_own() -> None:
    tables = score_tables(
        [Score(metric="accuracy", values={"all": 0.97}), Score(metric="AUC", values={"a": 0.9})]
    )
    assert [(table.metric, table.has_mean) for table in tables] == [
        ("accuracy", False),
        ("AUC", False),
    ]


def test_pictures_are_inside_and_have_words_for_who_cannot_see() -> None:
    images = [a for tag, a in page(full()).tags if tag == "img"]
    assert all(image["alt"] for image in images)
    (picture,) = (image for image in images if (image["src"] or "").startswith("data:image/png"))
    assert base64.b64decode((picture["src"] or "").partition(",")[2]) == PNG
    assert (picture["width"], picture["height"]) == ("1", "1")
    assert picture["alt"] == "northfield: A slice."


def test_what_is_not_a_picture_is_refused() -> None:
    with pytest.raises(ValidationError, match="PNG"):
        Picture(png=b"GIF89a")


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        StudyReport(name="a", titel="b")  # type: ignore[call-arg]


@given(st.floats(0, 1e6))
def test_an_epsilon_is_never_shown_smaller_than_it_is(value: float) -> None:
    shown = float(wording.epsilon(value))
    assert value - 1e-8 <= shown < value + 0.0101


@given(st.floats(0, 1))
def test_a_bound_in_percent_is_never_shown_smaller_than_it_is(value: float) -> None:
    assert float(wording.percent(value).removesuffix(" %")) >= value * 100 - 1e-6


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.epsilon(7.1), "7.10"),
        (wording.epsilon(7.1001), "7.11"),
        (wording.epsilon(math.inf), "∞"),
        (wording.epsilon(None), "–"),
        (wording.number(1e-3), "0.001"),
        (wording.number(1e-5), "1e-05"),
        (wording.number(math.nan), "–"),
        (wording.figure(0.5307), "0.531"),
        (wording.figure(0), "0.000"),
        (wording.figure(2.5e-7), "2.5e-07"),
        (wording.score(0.8765), "0.876"),
        (wording.plus_minus(0.8249, 0.041), ".82 ± .04"),
        (wording.plus_minus(-0.1, 0.3), "-.10 ± .30"),
        (wording.plus_minus(0.999, 0.001), "1.00 ± .00"),
        (wording.plus_minus(10.05, 20.0), "10.05 ± 20.00"),
        (wording.percent(0.074), "7.4 %"),
        (wording.percent(0.99996), "100.00 %"),
        (wording.percent(1), "100 %"),
        (wording.data_size(812), "812 bytes"),
        (wording.data_size(23_764), "23.8 kB"),
        (wording.data_size(999_960), "1.0 MB"),
        (wording.duration(0.416), "0.42 s"),
        (wording.duration(59.96), "1 min 00 s"),
        (wording.duration(7500), "2 h 05 min"),
        (wording.duration(None), "–"),
        (wording.plural(1, "entry"), "1 entry"),
        (wording.plural(2, "entry"), "2 entries"),
        (wording.listed(["a", "b", "c"]), "a, b and c"),
        (wording.moment(datetime(2026, 3, 1, 9, 30)), "2026-03-01 09:30 UTC"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


def test_curves_survive_gaps_and_a_single_round() -> None:
    gap = {"a": ([1, 2, 3], [0.5, math.nan, 0.4]), "b": ([1], [math.inf])}
    for drawn in (
        curves.over_rounds(gap, title="Loss", last=3),
        curves.over_rounds({"a": ([1], [1.0])}, title="ε", limits={"budget": 2.0}, last=1),
        curves.round_times([(1, 0.0, True)], title="Seconds", last=1),
    ):
        assert drawn.lstrip().startswith(b"<?xml") and b"</svg>" in drawn


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("ink", "ground"),
    [
        ("ink", "paper"),
        ("ink", "soft"),
        ("muted", "paper"),
        ("muted", "soft"),
        ("accent", "paper"),
        ("good", "good-soft"),
        ("bad", "bad-soft"),
        ("warn", "warn-soft"),
    ],
)
def test_text_stands_out_from_its_ground(ink: str, ground: str) -> None:
    html = render_study_report(StudyReport(name="a"))
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", html))
    light, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5
