"""The state machine: its verdicts for given series of samples, and what must hold for any series."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import judgement, metrics, state
from vllm_health.limits import Limits
from vllm_health.state import MIN_MOVEMENT_BYTES, CanaryResult, Engine, Movement, Sample

LIMITS = Limits()
TICK = LIMITS.interval_s
TOKENS, KV = "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc"


def engine(tokens=0.0, *, running=0, waiting=0, kv=0.0, asleep=False, preemptions=0):
    return Engine(
        steps={TOKENS: tokens}, gauges={KV: kv}, preemptions=preemptions, running=running, waiting=waiting, kv_usage=kv,
        asleep=asleep,
    )  # fmt: skip


def sample_of(tokens=0.0, canary=None, health="ok", **fields):
    """Return a sample of one engine."""
    extra = {name: fields.pop(name) for name in ("draining", "ended", "gpu_faults", "health_detail") if name in fields}
    return Sample(
        health=health,
        engines={"0": engine(tokens, **fields)},
        canaries={"0": canary} if isinstance(canary, CanaryResult) else canary or {},
        **extra,
    )


class Course:
    """One run of vLLM, sample by sample, with the state after the last sample."""

    def __init__(self, limits=LIMITS, at=0.0):
        self.limits, self.now = limits, at
        self.state = state.initial(at)

    def see(self, sample, after=None):
        self.now += self.limits.interval_s if after is None else after
        self.state = judgement.advance(self.state, sample, self.now, self.limits)
        return self.state

    def until(self, name, sample, most=1000.0):
        """Repeat ``sample`` until the state has that name, and return the seconds that it took."""
        began = self.now
        while self.state.name != name:
            assert self.now - began < most, f"{self.state.name} after {most} s: {self.state.reason}"
            self.see(sample)
        return self.now - began

    def until_asked(self, sample):
        """Repeat ``sample`` until a canary is pending."""
        while not state.canaries(self.state):
            self.see(sample)

    def stays(self, names, sample, seconds):
        """Repeat ``sample`` for so many seconds and check that the state keeps one of these names."""
        began = self.now
        while self.now - began < seconds:
            self.see(sample)
            assert self.state.name in names, self.state.reason

    @property
    def verdicts(self):
        return judgement.verdicts(self.state, self.limits)


@pytest.fixture
def serving():
    course = Course()
    course.see(sample_of(5))
    assert course.state.name == "ready"
    return course


def test_since_is_the_time_of_the_last_change_of_state():
    course = Course(at=7.0)
    assert course.state.since == 7.0
    course.see(starting(), after=0.0)
    assert course.state.start_s == 0.0
    for _ in range(3):
        course.see(sample_of(course.now))
    assert course.state.since == 7.0 + TICK
    assert course.state.start_s == TICK


@pytest.mark.parametrize(
    ("before", "after", "is_transition"),
    [
        ("starting", "starting", False),
        ("starting", "ready", True),
        ("starting", "saturated", True),
        ("ready", "saturated", False),
        ("saturated", "ready", False),
        ("saturated", "suspect", True),
        ("suspect", "ready", True),
        ("ready", "draining", True),
        ("dead", "dead", False),
        ("dead", "starting", True),
    ],
)
def test_a_new_name_is_a_transition_except_between_ready_and_saturated(before, after, is_transition):
    old = state.State(sampled_at=1, since=1, began=0, name=before)
    new = state.State(sampled_at=2, since=2, began=0, name=after)
    assert judgement.transition(old, new) == (judgement.Transition(old, new) if is_transition else None)


# ---- starts


def starting(**movement):
    """Return a sample during start-up."""
    return Sample(health="refused", movement=Movement(**movement), phase="compiling", progress="compiling, 3 s so far")


def test_a_start_with_progress_may_take_any_time():
    course = Course()
    for step in range(10_000):
        course.see(starting(lines=step // 50), after=2.0)
        assert course.state.name == "starting"
    assert course.verdicts == judgement.Verdicts(live=True, ready=False, started=False)
    assert course.state.reason == "vLLM is not ready yet: compiling, 3 s so far."
    assert course.state.start_s == 20_000
    assert course.state.phases == {"compiling": 20_000}


@pytest.mark.parametrize("name", ["lines", "processes", "read", "written", "resident", "gpu"])
def test_each_kind_of_movement_is_progress(name):
    enough = 1 if name in {"lines", "processes"} else MIN_MOVEMENT_BYTES
    assert state.has_moved(Movement(), Movement(**{name: enough}))
    assert state.has_moved(Movement(**{name: enough}), Movement())
    if enough > 1:
        assert not state.has_moved(Movement(), Movement(**{name: MIN_MOVEMENT_BYTES - 1}))
    assert not state.has_moved(Movement(**{name: 7}), Movement(**{name: 7}))


def test_small_movements_of_several_samples_add_up():
    course = Course()
    course.see(starting())
    for step in range(1, 4):
        course.see(starting(read=step * MIN_MOVEMENT_BYTES // 2))
        assert course.state.start_quiet_s == (TICK if step % 2 else 0)


def test_a_start_without_progress_is_dead_and_names_its_phase():
    course = Course()
    course.see(starting(processes=2))
    assert course.until("dead", starting(processes=2)) == LIMITS.start_stall_s
    assert course.state.reason == (
        "Start-up is stuck in phase 'compiling': it has made no progress for 600 s "
        "(no log line, no bytes read or written, no change of memory)."
    )
    assert not course.verdicts.live
    course.see(starting(lines=1))
    assert course.state.name == "starting"


def test_a_start_whose_progress_is_hidden_is_never_dead():
    course = Course()
    course.stays({"starting"}, Sample(health="refused"), 100_000)
    assert course.state.reason == "vLLM is not ready yet (the prober cannot see whether start-up makes progress)."


def test_start_stall_0_never_ends_a_start():
    course = Course(Limits(start_stall_s=0))
    course.stays({"starting"}, starting(), 10_000)


def test_vllm_is_ready_from_the_first_200_on_and_the_phases_are_kept():
    course = Course()
    course.see(starting(), after=30)
    course.see(sample_of(), after=10)
    assert course.verdicts == judgement.Verdicts(live=True, ready=True, started=True)
    assert course.state.start_s == 40
    assert course.state.phases == {"compiling": 30}
    assert course.state.since == 40


# ---- stalls


def test_an_idle_engine_gets_canaries_and_stays_ready(serving):
    for _ in range(20):
        serving.stays({"ready"}, sample_of(5), LIMITS.idle_quiet_s - TICK)
        assert state.canaries(serving.state) == {}
        serving.see(sample_of(5))
        assert list(state.canaries(serving.state)) == ["0"]
        assert serving.see(sample_of(5, CanaryResult("answered"))).name == "ready"
        assert state.canaries(serving.state) == {}


@pytest.mark.parametrize(("running", "quiet"), [(0, LIMITS.idle_quiet_s), (3, LIMITS.busy_quiet_s)])
def test_a_stuck_engine_is_stalled_and_then_dead(serving, running, quiet):
    stuck = sample_of(5, running=running)
    stalled = serving.until("stalled", stuck)
    assert stalled == quiet + 2 * LIMITS.canary_s
    assert serving.verdicts == judgement.Verdicts(live=True, ready=False, started=True)
    assert stalled + serving.until("dead", stuck) == quiet + 3 * LIMITS.canary_s
    assert serving.verdicts == judgement.Verdicts(live=False, ready=False, started=True)
    assert "Engine 0 has made no step" in serving.state.reason
    assert "3 one-token requests of the prober got no answer" in serving.state.reason


def test_more_frequent_samples_do_not_change_the_time_to_dead():
    course = Course()
    course.see(sample_of(5, running=1))
    while course.state.name != "dead":
        course.see(sample_of(5, running=1), after=0.25)
    assert course.now - TICK == LIMITS.busy_quiet_s + 3 * LIMITS.canary_s


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_very_short_limits_hold_too(seconds):
    limits = Limits(stall_s=seconds, start_stall_s=seconds)
    for first, later in ((sample_of(5), sample_of(5, running=1)), (starting(), starting())):
        course = Course(limits)
        course.see(first)
        assert course.until("dead", later) <= limits.dead_after_s
        assert not course.verdicts.live


def test_a_metric_that_appears_for_the_first_time_is_not_a_step():
    course = Course()
    course.see(Sample(health="ok", engines={"0": Engine(steps={KV: 0.0})}))
    course.see(sample_of(5))
    assert course.state.engines["0"].quiet_s == TICK


def test_the_documented_bounds_hold_for_the_default_limits():
    assert (LIMITS.unready_after_s, LIMITS.dead_after_s) == (260.0, 325.0)


def test_an_engine_with_only_waiting_requests_gets_its_canary_after_the_idle_time(serving):
    assert serving.until("stalled", sample_of(5, waiting=4)) == LIMITS.idle_quiet_s + 2 * LIMITS.canary_s


def test_a_new_canary_follows_each_strike(serving):
    numbers = []
    while serving.state.name != "dead":
        serving.see(sample_of(5, running=1))
        numbers += [number for number in state.canaries(serving.state).values() if number not in numbers]
    assert numbers == [1, 2, 3, 4]


def test_a_suspect_engine_has_its_reason(serving):
    serving.until("suspect", sample_of(5, running=2, waiting=1))
    assert serving.verdicts.ready
    quiet = "Engine 0 has made no step for {} s with {} running and 1 waiting requests; "
    assert serving.state.reason == quiet.format(120, 2) + "a one-token request of the prober has waited for 0 s."
    serving.see(sample_of(5, running=3, waiting=1))
    assert serving.state.reason == quiet.format(125, 3) + "a one-token request of the prober has waited for 5 s."
    while not serving.state.engines["0"].strikes:
        serving.see(sample_of(5, running=3, waiting=1))
    assert serving.state.reason == (
        quiet.format(180, 3)
        + "a one-token request of the prober has waited for 0 s, the request before it got no answer."
    )


def test_a_strike_is_in_the_reason_even_when_no_canary_is_pending(serving):
    while not serving.state.engines["0"].strikes:
        serving.see(sample_of(5))
    serving.see(sample_of(5, CanaryResult("inconclusive", "503")))
    while state.canaries(serving.state):
        serving.see(sample_of(5))
    assert serving.state.name == "suspect"
    assert serving.state.reason == (
        "Engine 0 has made no step for 0 s with 0 running and 0 waiting requests; "
        "a one-token request of the prober got no answer."
    )


@pytest.mark.parametrize("change", [{"tokens": 6}, {"kv": 0.5}, {"tokens": 0}])
def test_any_step_makes_a_stalled_engine_ready(serving, change):
    serving.until("stalled", sample_of(5, running=1))
    serving.see(sample_of(**{"tokens": 5, "running": 1, **change}))
    assert serving.state.name == "ready"
    assert state.canaries(serving.state) == {}


def test_an_idle_engine_with_frozen_gauges_is_ready(serving):
    """After an abort of all requests (vllm-project/vllm#22545) "running" stays above 0, and canaries are answered."""
    frozen = sample_of(5, running=106)
    serving.until("suspect", frozen)
    serving.see(msgspec.structs.replace(frozen, canaries={"0": CanaryResult("answered")}))
    assert serving.state.name == "ready"


def test_a_long_chunked_prefill_changes_only_the_kv_cache_usage(serving):
    for step in range(1000):
        serving.see(sample_of(5, running=1, kv=step / 1000))
        assert serving.state.name == "ready"


def test_an_overloaded_engine_is_saturated_and_fails_no_probe(serving):
    for step in range(1000):
        serving.see(sample_of(step, running=256, waiting=2000, kv=1.0))
        assert serving.state.name == "saturated"
        assert serving.verdicts == judgement.Verdicts(live=True, ready=True, started=True)
    assert serving.state.reason == (
        "vLLM serves as much as it can: 256 running and 2000 waiting requests, KV cache usage 100%."
    )


@pytest.mark.parametrize("stuck", ["0", "1"])
def test_the_stuck_engine_among_several_is_dead(stuck):
    course = Course()

    def sample(step):
        engines = {name: engine(5 if name == stuck else step, running=1, waiting=1) for name in "01"}
        return Sample(health="ok", engines=engines)

    course.see(sample(0))
    for step in range(1, 1000):
        course.see(sample(step))
        assert set(state.canaries(course.state)) <= {stuck}
        if course.state.name == "dead":
            break
    assert course.state.reason == (
        f"Engine {stuck} has made no step for 300 s with 1 running and 1 waiting requests, "
        "and 3 one-token requests of the prober got no answer: it hangs."
    )
    assert course.now <= LIMITS.dead_after_s


def test_vllm_is_saturated_only_when_every_engine_has_waiting_requests():
    course = Course()
    full = engine(1, running=3, waiting=9)
    course.see(Sample(health="ok", engines={"0": full, "1": engine(1, running=3)}))
    assert course.state.name == "ready"
    course.see(Sample(health="ok", engines={"0": full, "1": engine(1, running=1, waiting=1)}))
    assert course.state.name == "saturated"


def test_a_request_that_waits_while_none_runs_is_no_saturation(serving):
    for step in range(1000):
        canary = CanaryResult("answered") if state.canaries(serving.state) else None
        serving.see(sample_of(5 + step // 20, canary, waiting=1))
        assert serving.state.name == "ready", serving.state.reason


def test_an_engine_that_metrics_no_longer_show_is_not_watched():
    course = Course()
    course.see(Sample(health="ok", engines={"0": engine(), "1": engine()}))
    course.see(Sample(health="ok", engines={"0": engine(1)}))
    assert list(course.state.engines) == ["0"]


def test_a_hang_is_detected_without_metrics(serving):
    silent = Sample(health="unanswered")
    assert serving.until("dead", silent) <= LIMITS.dead_after_s


def test_a_late_answer_of_metrics_shows_steps(serving):
    for step in range(1000):
        serving.see(sample_of(step, running=1) if step % 20 == 0 else Sample(health="unanswered"))
        assert serving.state.name == "ready"


def test_one_hung_api_server_of_several_does_not_hide_the_engines_steps(serving):
    """Requests that reach it get no answer. Each of the other API servers shows the metrics of all."""
    for step in range(1000):
        serving.see(Sample(health="unanswered") if step % 2 else sample_of(step, running=1))
        assert serving.state.name == "ready"


def test_a_partial_exposition_is_not_a_step(serving):
    half = Sample(health="ok", engines={"0": Engine(steps={}, gauges={KV: 0.0}, running=1)})
    serving.until("suspect", half)
    serving.see(sample_of(5, running=1))
    assert serving.state.name == "suspect"


@pytest.mark.parametrize(
    "engines", [None, {"0": Engine(steps={}, gauges={KV: 0.0}, running=8, waiting=56)}], ids=["none", "half"]
)
def test_an_engine_without_readable_metrics_is_only_suspect_while_health_answers(serving, engines):
    """A canary may only be waiting behind other requests of a full engine."""
    serving.see(sample_of(6, running=8, waiting=56))
    unread = Sample(health="ok", engines=engines)
    serving.stays({"saturated", "suspect"}, unread, 10_000)
    assert serving.verdicts.ready
    assert serving.state.name == "suspect"
    assert serving.state.reason.endswith(" s, /metrics cannot be read.")
    assert serving.until("dead", sample_of(6, running=8, waiting=56)) <= 4 * LIMITS.canary_s
    assert "/metrics" not in serving.state.reason


def test_one_answer_of_health_per_canary_prevents_a_strike_without_metrics(serving):
    serving.see(sample_of(6, running=8))
    samples = [Sample(health="unanswered")] * int(LIMITS.canary_s / TICK - 1) + [Sample(health="ok")]
    for sample in samples * 20:
        serving.see(sample)
        assert serving.verdicts.live


def test_one_complete_exposition_per_canary_is_enough_for_a_strike(serving):
    serving.see(sample_of(6, running=8))
    samples = [Sample(health="ok")] * int(LIMITS.canary_s / TICK - 1) + [sample_of(6, running=8)]
    for sample in samples * 20:
        serving.see(sample)
    assert serving.state.name == "dead"


def test_without_step_counters_only_the_api_server_is_watched():
    course = Course()
    without_engines = Sample(health="ok", engines={})
    course.stays({"ready"}, without_engines, 10_000)
    assert course.state.reason == (
        "vLLM serves. /metrics has no engine metrics, so the prober cannot detect an engine that hangs: remove --disable-log-stats."
    )
    assert state.canaries(course.state) == {}
    course.until("stalled", Sample(health="unanswered", engines=None))
    assert course.state.reason == (
        "The API server has answered nothing for 180 s, and 2 one-token requests of the prober got no answer: it hangs."
    )


def test_vllm_is_dead_when_health_answers_503_twice_in_a_row_without_a_body(serving):
    for health in ("engine dead", "ok", "engine dead", "unavailable", "engine dead", "unanswered", "engine dead"):
        serving.see(sample_of(6, health=health))
        assert serving.state.name in {"ready", "unavailable"}
    serving.see(sample_of(6, health="engine dead"))
    assert serving.state.name == "dead"
    assert serving.state.reason == "vLLM reports that its engine is dead (503 from /health)."


def test_stall_0_never_suspects_an_engine():
    course = Course(Limits(stall_s=0))
    course.see(sample_of(5))
    course.stays({"ready"}, sample_of(5, running=1), 10_000)


# ---- answers to canaries


REFUSED = CanaryResult("refused", "401 from /v1/completions: no key")


def test_a_503_with_a_body_is_not_ready_and_not_dead(serving):
    """vLLM answers so while it changes its number of engines, and a proxy while it cannot reach vLLM."""
    scaling = sample_of(5, health="unavailable", health_detail="503: scaling", running=4)
    serving.stays({"unavailable"}, scaling, 10_000)
    assert serving.verdicts == judgement.Verdicts(live=True, ready=False, started=True)
    assert serving.state.reason == "/health answers 503 (503: scaling). No hang can be detected until it answers 200."
    assert state.canaries(serving.state) == {}
    serving.see(sample_of(6, running=4))
    assert serving.state.name == "ready"


def test_a_refused_canary_is_no_strike_and_is_sent_again_later(serving):
    serving.until("suspect", sample_of(5, running=1))
    serving.see(sample_of(5, REFUSED, running=1))
    assert state.canaries(serving.state) == {}
    serving.stays({"suspect"}, sample_of(5, running=1), LIMITS.refused_retry_s - 2 * TICK)
    assert serving.verdicts.ready
    problem = "The prober cannot confirm a hang: 401 from /v1/completions: no key."
    assert serving.state.reason.endswith(problem)
    serving.until_asked(sample_of(5, running=1))
    serving.see(sample_of(5, CanaryResult("answered"), running=1))
    assert serving.state.name == "ready"
    assert problem not in serving.state.reason


def test_an_engine_that_hangs_after_a_refusal_is_dead(serving):
    serving.until("suspect", sample_of(5, running=1))
    serving.see(sample_of(5, REFUSED, running=1))
    serving.until("dead", sample_of(5, running=1))


def test_a_refusal_for_one_engine_does_not_hide_another_that_hangs():
    course = Course()
    both = Sample(health="ok", engines={"0": engine(5), "1": engine(5, running=3)})
    course.see(both)
    while course.state.name != "dead":
        canaries = {"0": REFUSED} if "0" in state.canaries(course.state) else {}
        course.see(msgspec.structs.replace(both, canaries=canaries))
        assert course.now < LIMITS.dead_after_s + 2 * TICK
    assert course.state.reason.startswith("Engine 1")


def test_a_canary_that_failed_is_no_strike(serving):
    failed = CanaryResult("failed", "http://vllm/is_paused: Connection reset by peer")
    for running in (0, 2):
        for _ in range(500):
            canary = failed if state.canaries(serving.state) else None
            serving.see(sample_of(5, canary, running=running))
            assert serving.state.name in {"ready", "suspect"}, serving.state.reason
        assert serving.state.reason.endswith(f"The prober cannot confirm a hang: {failed.detail}.")
    assert serving.state.name == "suspect"


def test_motion_without_work_is_found_to_hang(serving):
    """Requests are preempted again and again: gauges and preemptions change, and no token comes."""
    began, step = serving.now, 0
    while serving.state.name != "dead":
        step += 1
        serving.see(sample_of(5, running=3 + step % 2, kv=0.5 + step % 7 / 100, preemptions=step // 3))
        assert serving.now - began < LIMITS.dead_after_s + 2 * TICK


def test_a_long_prefill_after_a_preemption_is_work(serving):
    """A chunked prefill changes only the usage of the KV cache."""
    serving.see(sample_of(6, running=1, kv=0.1, preemptions=1))
    for step in range(1, 1000):
        serving.see(sample_of(6, running=1, kv=0.1 + step / 2000, preemptions=1))
        assert serving.state.name in {"ready", "suspect"}, serving.state.reason
    assert serving.state.name == "ready"


def test_each_canary_has_a_new_number(serving):
    numbers = []
    for canary in (CanaryResult("answered"), CanaryResult("inconclusive", "503"), CanaryResult("paused"), None) * 2:
        while not state.canaries(serving.state):
            serving.see(sample_of(5))
        numbers.append(state.canaries(serving.state)["0"])
        serving.see(sample_of(5, canary))
        while state.canaries(serving.state).get("0") == numbers[-1]:
            serving.see(sample_of(5))
        serving.see(sample_of(5 if canary else serving.now))
    assert numbers == sorted(set(numbers))


def test_an_inconclusive_answer_does_not_clear_a_strike(serving):
    serving.until("suspect", sample_of(5))
    serving.see(sample_of(5, CanaryResult("inconclusive", "503")))
    while state.canaries(serving.state):
        serving.see(sample_of(5))
    assert serving.until("stalled", sample_of(5)) == LIMITS.idle_quiet_s + LIMITS.canary_s


def test_an_engine_without_canaries_is_suspect_when_its_canary_would_be_due(serving):
    serving.until("suspect", sample_of(5, running=1))
    serving.see(sample_of(5, CanaryResult("refused", "401"), running=1))
    serving.see(sample_of(6, running=1))
    assert serving.until("suspect", sample_of(6, running=1)) == LIMITS.busy_quiet_s


def test_a_full_api_server_is_a_strike_only_while_the_engine_has_work(serving):
    """503 of admission control comes from the API server, not from the engine (entrypoints of 0.32.0)."""
    full = CanaryResult("inconclusive", "503")
    while serving.now < 10_000:
        asked = bool(state.canaries(serving.state))
        assert serving.see(sample_of(5, full if asked else None)).name == "ready"
    while serving.state.name != "dead":
        asked = bool(state.canaries(serving.state))
        serving.see(sample_of(5, full if asked else None, running=1))
    assert serving.now - 10_000 <= LIMITS.dead_after_s


def test_an_inconclusive_answer_is_a_strike_only_after_the_whole_canary_time(serving):
    serving.until("suspect", sample_of(5, running=1))
    serving.see(sample_of(5, CanaryResult("inconclusive", "500"), running=1))
    assert serving.until("stalled", sample_of(5, running=1)) >= 2 * LIMITS.canary_s - 2 * TICK


def test_a_paused_engine_is_asleep_until_it_makes_a_step(serving):
    paused = CanaryResult("paused")
    for _ in range(10_000):
        asked = bool(state.canaries(serving.state))
        serving.see(sample_of(5, paused if asked else None, waiting=3))
        assert serving.verdicts.live
    assert serving.state.name == "asleep"
    assert serving.state.reason == ("vLLM is paused at its operator's request. It serves nothing until POST /resume.")
    serving.see(sample_of(6))
    assert serving.state.name == "ready"


def test_an_answered_canary_ends_the_pause(serving):
    serving.until_asked(sample_of(5))
    serving.see(sample_of(5, CanaryResult("paused")))
    assert serving.state.name == "asleep"
    serving.see(sample_of(5, CanaryResult("answered")))
    assert serving.state.name == "ready"


def test_a_pause_is_kept_when_another_engine_refuses_its_canary():
    course = Course()
    both = Sample(health="ok", engines={"0": engine(5), "1": engine(5)})
    course.see(both)
    course.until_asked(both)
    course.see(msgspec.structs.replace(both, canaries={"0": CanaryResult("paused"), "1": CanaryResult("paused")}))
    assert course.state.name == "asleep"
    course.see(msgspec.structs.replace(both, canaries={"1": CanaryResult("refused", "401")}))
    assert course.state.engines["0"].paused


def test_a_sleeping_engine_is_not_ready_and_gets_no_canary(serving):
    serving.stays({"asleep"}, sample_of(5, asleep=True), 10_000)
    assert serving.verdicts == judgement.Verdicts(live=True, ready=False, started=True)
    assert state.canaries(serving.state) == {}
    assert serving.state.reason == "vLLM is asleep at its operator's request. It serves nothing until POST /wake_up."
    assert serving.see(sample_of(5)).name == "ready"


# ---- drains, ends, GPUs


def test_a_draining_vllm_is_live_but_not_ready_and_gets_no_canary(serving):
    serving.stays({"draining"}, sample_of(5, running=1, draining="SIGTERM came."), 10_000)
    assert serving.state.reason == "SIGTERM came."
    assert serving.verdicts == judgement.Verdicts(live=True, ready=False, started=True)
    assert state.canaries(serving.state) == {}
    serving.see(Sample(health="refused", draining="SIGTERM came."))
    assert serving.verdicts.started


def test_an_ended_vllm_is_dead_with_its_reason(serving):
    serving.see(Sample(health="refused", ended="vLLM exited with status 1.", draining="SIGTERM came."))
    assert (serving.state.name, serving.state.reason) == ("dead", "vLLM exited with status 1.")


def test_a_refused_connection_after_the_start_is_a_new_start(serving):
    """Beside a sidecar, vLLM's container restarts by itself. A failed liveness probe would only kill the new one."""
    serving.until("dead", sample_of(5, running=1))
    serving.see(Sample(health="refused"))
    assert serving.state.name == "starting"
    assert serving.verdicts == judgement.Verdicts(live=True, ready=False, started=False)
    serving.see(sample_of(0))
    assert serving.state.name == "ready"
    assert serving.state.start_s == TICK


@pytest.mark.parametrize(("fault_kills", "live"), [(False, True), (True, False)])
def test_a_fatal_gpu_fault_is_not_ready_and_fails_liveness_only_with_gpu_fault_kills(fault_kills, live):
    course = Course(Limits(gpu_fault_kills=fault_kills))
    course.see(sample_of(5))
    course.see(sample_of(6, gpu_faults=("GPU 1: Xid 79, the GPU has fallen off the bus", "GPU 2: lost")))
    assert course.state.name == "gpu_fault"
    assert course.verdicts == judgement.Verdicts(live=live, ready=False, started=True)
    assert course.state.reason == (
        "GPU 1: Xid 79, the GPU has fallen off the bus; GPU 2: lost: /readyz fails. "
        "A restart of vLLM does not repair a GPU: reset the GPU, or reboot the host."
    )
    course.until("dead", sample_of(6, gpu_faults=("GPU 1",)))
    assert not course.verdicts.live


def test_the_state_metric_has_every_state():
    assert set(metrics.STATES) == set(state.Name.__args__)


# ---- what holds for any series of samples

COUNTS = st.integers(0, 5)
ANSWERS = st.sampled_from(
    [
        None,
        CanaryResult("answered"),
        CanaryResult("inconclusive", "503"),
        CanaryResult("refused", "401"),
        CanaryResult("failed", "reset"),
    ]
)
GAPS = st.floats(0.01, TICK)


@st.composite
def samples(draw):
    engines = draw(
        st.none()
        | st.dictionaries(
            st.sampled_from("01"), st.builds(engine, COUNTS, running=COUNTS, waiting=COUNTS, asleep=st.booleans())
        )
    )
    return Sample(
        health=draw(st.sampled_from(["ok", "refused", "unanswered", "unavailable", "engine dead"])),
        engines=engines,
        canaries={name: answer for name in (engines or ()) if (answer := draw(ANSWERS))},
        movement=draw(st.none() | st.builds(Movement, lines=COUNTS)),
        draining=draw(st.none() | st.just("drain")),
        gpu_faults=draw(st.just(()) | st.just(("fault",))),
    )  # fmt: skip


@given(st.lists(st.tuples(samples(), st.floats(-1e6, 1e6)), max_size=60))
def test_any_series_of_samples_gives_a_valid_state(series):
    run = Course()
    for sample, after in series:
        run.see(sample, after=after)
        assert run.state.reason.endswith(".") or run.state.reason == "drain"
        assert all(watch.quiet_s >= 0 and watch.strikes >= 0 for watch in run.state.engines.values())
        assert run.verdicts.live or run.state.name in {"dead", "gpu_fault"}
        if run.verdicts.ready:
            assert run.state.started


NO_HELP = st.sampled_from(
    [None, CanaryResult("inconclusive", "503"), CanaryResult("refused", "401"), CanaryResult("failed", "reset")]
)


@given(st.lists(st.tuples(NO_HELP, NO_HELP, st.booleans(), st.floats(2, TICK)), min_size=60, max_size=200))
def test_while_an_engine_with_running_requests_is_too_quiet_the_state_is_never_ready(series):
    """Whatever the canaries of both engines get, except an answer."""
    run = Course()
    run.see(Sample(health="ok", engines={"0": engine(1), "1": engine(1, running=2)}))
    for step, (first, second, shown, after) in enumerate(series):
        engines = {"0": engine(step, waiting=1, running=1), "1": engine(1, running=2)} if shown else None
        answers = {name: answer for name, answer in (("0", first), ("1", second)) if answer}
        run.see(Sample(health="ok", engines=engines, canaries=answers), after=after)
        if run.state.engines["1"].quiet_s >= LIMITS.busy_quiet_s:
            assert run.state.name in {"suspect", "stalled", "dead"}, run.state.reason


@given(
    st.lists(st.tuples(st.sampled_from(["ok", "unanswered"]), COUNTS, COUNTS, ANSWERS, st.floats(0, 1e6)), max_size=200)
)
def test_an_engine_with_a_step_in_every_sample_is_never_suspect(series):
    run = Course()
    for step, (health, running, waiting, answer, after) in enumerate(series):
        run.see(sample_of(step, answer, health=health, running=running, waiting=waiting), after=after)
        assert run.state.name in {"starting", "ready", "saturated"}


@given(st.data(), st.integers(0, 9), st.integers(0, 9))
def test_a_stuck_engine_is_dead_within_the_bound_for_any_gauges(data, running, waiting):
    """Gauges may be frozen at any value. Samples come on time or early. No canary is answered."""
    run = Course()
    run.see(sample_of(5, running=running, waiting=waiting))
    began, unready = run.now, None
    while run.state.name != "dead":
        silent = data.draw(st.booleans())
        run.see(
            Sample(health="unanswered") if silent else sample_of(5, running=running, waiting=waiting),
            after=data.draw(st.floats(2, TICK)),
        )
        assert run.now - began <= LIMITS.dead_after_s
        unready = unready or (run.now if not run.verdicts.ready else None)
    assert unready - began <= LIMITS.unready_after_s


@given(
    st.lists(st.floats(0, 1e9), max_size=int((LIMITS.idle_quiet_s + 3 * LIMITS.canary_s) / LIMITS.longest_gap_s) - 1)
)
def test_time_in_which_the_prober_was_stopped_is_not_counted_as_a_stall(gaps):
    run = Course()
    run.see(sample_of(5))
    for gap in gaps:
        run.see(sample_of(5, running=1), after=gap)
        assert run.state.name != "dead"


@given(st.lists(samples(), max_size=60), st.floats(-1e9, 1e9))
def test_no_verdict_depends_on_the_absolute_time(series, shift):
    first, shifted = Course(), Course(at=float(round(shift)))
    for sample in series:
        assert first.see(sample).name == shifted.see(sample).name
        assert first.verdicts == shifted.verdicts
