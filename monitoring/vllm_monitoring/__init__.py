"""Dashboards and rules as code: what Prometheus and Grafana are given is generated from here. Not in the wheel."""
