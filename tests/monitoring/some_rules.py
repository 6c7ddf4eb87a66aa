"""The subset of the rules that some alerts need."""

from __future__ import annotations

import yaml
from cases import ALERT_OF


def rules_for(alerts, groups):
    """Return the text of a rules file with the rules of ``groups`` that ``alerts`` need. It makes promtool fast."""
    slos = {slo for slo, alert in ALERT_OF.items() if alert in alerts}
    selected_groups = []
    for group in groups:
        selected_rules = [rule for rule in group["rules"] if rule.get("alert") in alerts]
        if group["name"] == "vllm-slo" and slos:
            selected_rules = [rule for rule in group["rules"] if rule.get("labels", {}).get("slo", min(slos)) in slos]
        if selected_rules:
            selected_groups.append(group | {"rules": selected_rules})
    return yaml.safe_dump({"groups": selected_groups})
