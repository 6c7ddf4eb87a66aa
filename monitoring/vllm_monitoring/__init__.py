"""Generate the rules for Prometheus and the dashboards for Grafana. This package is not in the wheel."""
