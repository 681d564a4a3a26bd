"""``docs/howto/alerts.yaml``: its names are those of the code, and each rule fires when it should, by promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.pages import DOCS, page, table

from imagewatch.commands import metrics
from imagewatch.protocol.reasons import HOLDS

if TYPE_CHECKING:
    from pathlib import Path

FILE = DOCS / "howto/alerts.yaml"
RULES = FILE.read_text()
ALERTS = re.findall(r"^ +- alert: (\w+)$", RULES, re.MULTILINE)
STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "is_running": True,
    "inbox": "/srv/imagewatch/inbox",
    "updated": "2026-02-03T04:05:06Z",
    "last_scan": "2026-02-03T04:05:05Z",
    "waiting": {"ready": 0, "not_ready": 0, "why": {}},
    "ignored": {"count": 0},
    "in_flight": [],
    "holds": [],
    "today": {"completed": 0, "refused": 0, "unknown": 0, "credits": 0.0, "cap": 10.0},
    "month": {"completed": 0, "refused": 0, "unknown": 0, "credits": 0.0, "cap": 10.0},
    "budgets": [
        {"folder": "anna", "today": {"credits": 1.0, "cap": 2.0}, "month": {"credits": 1.0, "cap": 2.0}},
    ],
    "notifications": {"pending": 0, "failed": 0},
    "redelivered": 0,
    "balance": {"credits": 93.5, "at": "2026-02-03T04:05:04Z"},
}
"""A status with everything that can be a metric."""
HERE = 'instance="a",inbox="/i"'
HOUR = {"eval_time": "1h"}
FIRING = {
    "ImagewatchMetricsMissing": {'node_textfile_mtime_seconds{instance="a",file="/x/imagewatch.prom"}': "0x90"},
    "ImagewatchDown": {f"imagewatch_up{{{HERE}}}": "0x90"},
    "ImagewatchScanOverdue": {
        f"imagewatch_up{{{HERE}}}": "1x90",
        f"imagewatch_last_scan_timestamp_seconds{{{HERE}}}": "0x90",
    },
    "ImagewatchOnHoldForPerson": {f'imagewatch_held{{{HERE},reason="key"}}': "1x90"},
    "ImagewatchOnHold": {f'imagewatch_held{{{HERE},reason="disk"}}': "1x90"},
    "ImagewatchJobStuck": {f"imagewatch_stuck_jobs{{{HERE}}}": "2x90"},
    "ImagewatchChargeUnknown": {
        f'imagewatch_period_jobs{{{HERE},period="month",outcome="unknown"}}': "0x30 1x60",
    },
    "ImagewatchNotificationsFailed": {f"imagewatch_failed_notifications{{{HERE}}}": "1x90"},
    "ImagewatchCapNearlySpent": {
        f'imagewatch_period_credits{{{HERE},period="day"}}': "81x90",
        f'imagewatch_period_cap_credits{{{HERE},period="day"}}': "100x90",
    },
    "ImagewatchBudgetReached": {f'imagewatch_budget_held{{{HERE},folder="anna"}}': "1x90"},
    "ImagewatchBalanceLow": {f"imagewatch_balance_credits{{{HERE}}}": "499x90"},
}
"""For each alert the series that let it fire: a value, and for how many minutes more."""
QUIET = {
    'node_textfile_mtime_seconds{instance="a",file="/x/imagewatch.prom"}': "0+60x90",
    f"imagewatch_up{{{HERE}}}": "1x90",
    f"imagewatch_last_scan_timestamp_seconds{{{HERE}}}": "0+60x90",
    **{f'imagewatch_held{{{HERE},reason="{kind}"}}': "0x90" for kind in HOLDS},
    f"imagewatch_stuck_jobs{{{HERE}}}": "0x90",
    f'imagewatch_period_jobs{{{HERE},period="month",outcome="unknown"}}': "3x90",
    f"imagewatch_failed_notifications{{{HERE}}}": "0x90",
    f'imagewatch_period_credits{{{HERE},period="day"}}': "79x90",
    f'imagewatch_period_cap_credits{{{HERE},period="day"}}': "100x90",
    f'imagewatch_budget_held{{{HERE},folder="anna"}}': "0x90",
    f"imagewatch_balance_credits{{{HERE}}}": "501x90",
}
"""The series of a healthy service."""


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool (apt install prometheus)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fires(where: Path, series: dict[str, str], alert: str) -> bool:
    """Whether an alert fires within an hour."""
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                **HOUR,
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }
    file = where / "case.json"
    file.write_text(json.dumps({"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": [case]}))
    program = shutil.which("promtool")
    assert program is not None
    done = subprocess.run([program, "test", "rules", file], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in {0, 1}, done.stderr
    assert "error" not in done.stderr
    return done.returncode == 0


def test_the_rules_name_only_metrics_and_labels_that_exist():
    families = text_string_to_metric_families(metrics.text(STATUS))
    labels: dict[str, dict[str, set[str]]] = {}
    for sample in (sample for family in families for sample in family.samples):
        known = labels.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            known.setdefault(label, set()).add(value)
    named = re.findall(
        r"\b(imagewatch_\w+)(?:\{([^}]*)\})?", "\n".join(re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE))
    )
    assert len(named) >= len(ALERTS)
    for name, selector in named:
        assert name in labels, name
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            assert set(value.split("|")) <= labels[name][label], f"{name}{{{label}}}"


def test_each_kind_of_hold_is_in_exactly_one_rule():
    named = re.findall(r'imagewatch_held\{reason=~"([\w|]+)"\}', RULES)
    assert sorted("|".join(named).split("|")) == sorted(HOLDS)


def test_the_page_explains_each_alert():
    assert re.findall(r"^\| `(Imagewatch\w+)` \|", page("howto/monitor"), re.MULTILINE) == ALERTS


def test_prometheus_accepts_the_rules():
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", FILE)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_fires_when_it_should_and_not_for_a_healthy_service(alert, tmp_path):
    promtool("--version")
    assert fires(tmp_path, FIRING[alert], alert)
    assert not fires(tmp_path, QUIET, alert)


def test_the_reference_lists_each_metric_with_its_type_labels_and_meaning():
    families = text_string_to_metric_families(metrics.text(STATUS))
    found = []
    for family in families:
        labels = [f"`{label}`" for label in family.samples[0].labels if label != "inbox"]
        name = family.samples[0].name
        found.append([f"`{name}`", family.type, ", ".join(labels), family.documentation])
    assert table(page("reference/metrics"), "Each name begins") == found
