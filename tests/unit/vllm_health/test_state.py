"""The state machine by itself: what it says of each course of things, and what no course may make it say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import metrics, state
from vllm_health.limits import Limits
from vllm_health.state import LEAST_MOVEMENT, Canary, Engine, Movement, Sample

LIMITS = Limits()
TICK = LIMITS.interval_s
TOKENS, KV = "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc"


def engine(tokens=0.0, *, running=0, waiting=0, kv=0.0, asleep=False):
    return Engine(steps={TOKENS: tokens, KV: kv}, running=running, waiting=waiting, kv_usage=kv, asleep=asleep)


def one(tokens=0.0, canary=None, health="ok", **kw):
    """A sample of one engine."""
    extra = {name: kw.pop(name) for name in ("draining", "ended", "gpu_faults") if name in kw}
    return Sample(
        health=health,
        engines={"0": engine(tokens, **kw)},
        canaries={"0": canary} if isinstance(canary, Canary) else canary or {},
        **extra,
    )


class Course:
    """A life of vLLM, sample by sample."""

    def __init__(self, limits=LIMITS, at=0.0):
        self.limits, self.now = limits, at
        self.state = state.beginning(at)

    def see(self, sample, after=None):
        self.now += self.limits.interval_s if after is None else after
        self.state = state.advance(self.state, sample, self.now, self.limits)
        return self.state

    def until(self, name, sample, most=1000.0):
        """Seconds until the state has that name, seeing ``sample`` all the time."""
        began = self.now
        while self.state.name != name:
            assert self.now - began < most, f"{self.state.name} after {most} s: {self.state.reason}"
            self.see(sample)
        return self.now - began

    def until_asked(self, sample):
        """Until a canary is out."""
        while not state.canaries(self.state):
            self.see(sample)

    def stays(self, names, sample, seconds):
        began = self.now
        while self.now - began < seconds:
            self.see(sample)
            assert self.state.name in names, self.state.reason

    @property
    def told(self):
        return state.verdicts(self.state, self.limits)


@pytest.fixture
def serving():
    course = Course()
    course.see(one(5))
    assert course.state.name == "ready"
    return course


def test_since_is_when_it_came_to_be_so():
    course = Course(at=7.0)
    assert course.state.since == 7.0
    course.see(still(), after=0.0)
    assert course.state.start_s == 0.0
    for _ in range(3):
        course.see(one(course.now))
    assert course.state.since == 7.0 + TICK
    assert course.state.start_s == TICK


@pytest.mark.parametrize(
    ("before", "after", "news"),
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
def test_another_name_is_a_transition_but_load_that_comes_and_goes_is_none(before, after, news):
    old, new = state.State(at=1, since=1, began=0, name=before), state.State(at=2, since=2, began=0, name=after)
    assert state.transition(old, new) == (state.Transition(old, new) if news else None)


# ---- starts


def still(**moved):
    return Sample(health="refused", movement=Movement(**moved), phase="compiling", progress="compiling, 3 s so far")


def test_a_start_that_moves_survives_any_length():
    course = Course()
    for step in range(10_000):
        course.see(still(lines=step // 50), after=2.0)
        assert course.state.name == "starting"
    assert course.told == state.Verdicts(live=True, ready=False, started=False)
    assert course.state.reason == "vLLM is not ready yet: compiling, 3 s so far."
    assert course.state.start_s == 20_000
    assert course.state.phases == {"compiling": 20_000}


@pytest.mark.parametrize("name", ["lines", "processes", "read", "written", "resident", "gpu"])
def test_anything_that_moves_keeps_a_start_alive(name):
    enough = 1 if name in {"lines", "processes"} else LEAST_MOVEMENT
    assert state.has_moved(Movement(), Movement(**{name: enough}))
    assert state.has_moved(Movement(**{name: enough}), Movement())
    if enough > 1:
        assert not state.has_moved(Movement(), Movement(**{name: LEAST_MOVEMENT - 1}))
    assert not state.has_moved(Movement(**{name: 7}), Movement(**{name: 7}))


def test_small_movements_add_up():
    course = Course()
    course.see(still())
    for step in range(1, 4):
        course.see(still(read=step * LEAST_MOVEMENT // 2))
        assert course.state.still_s == (TICK if step % 2 else 0)


def test_a_start_in_which_nothing_moves_is_given_up_and_says_where():
    course = Course()
    course.see(still())
    assert course.until("dead", still()) == LIMITS.start_stall_s
    assert course.state.reason == (
        "The start stands still: in phase 'compiling' for 600 s no log line, no bytes read or written, "
        "no change of memory."
    )
    assert not course.told.live
    course.see(still(lines=1))
    assert course.state.name == "starting"


def test_a_start_that_cannot_be_seen_is_not_judged():
    course = Course()
    course.stays({"starting"}, Sample(health="refused"), 100_000)
    assert course.state.reason == "vLLM is not ready yet (from here nobody can see whether it moves)."


def test_start_stall_0_gives_up_no_start():
    course = Course(Limits(start_stall_s=0))
    course.stays({"starting"}, still(), 10_000)


def test_ready_is_from_the_first_200_on_and_the_phases_stay_known():
    course = Course()
    course.see(still(), after=30)
    course.see(one(), after=10)
    assert course.told == state.Verdicts(live=True, ready=True, started=True)
    assert course.state.start_s == 40
    assert course.state.phases == {"compiling": 30}
    assert course.state.since == 40


# ---- stalls


def test_an_idle_engine_is_asked_and_that_is_no_reason_for_doubt(serving):
    for _ in range(20):
        serving.stays({"ready"}, one(5), LIMITS.idle_quiet_s - TICK)
        assert state.canaries(serving.state) == {}
        serving.see(one(5))
        assert list(state.canaries(serving.state)) == ["0"]
        assert serving.see(one(5, Canary("answered"))).name == "ready"
        assert state.canaries(serving.state) == {}


@pytest.mark.parametrize(("running", "quiet"), [(0, LIMITS.idle_quiet_s), (3, LIMITS.busy_quiet_s)])
def test_a_stuck_engine_leaves_the_rotation_and_then_dies(serving, running, quiet):
    stuck = one(5, running=running)
    stalled = serving.until("stalled", stuck)
    assert stalled == quiet + 2 * LIMITS.canary_s
    assert serving.told == state.Verdicts(live=True, ready=False, started=True)
    assert stalled + serving.until("dead", stuck) == quiet + 3 * LIMITS.canary_s
    assert serving.told == state.Verdicts(live=False, ready=False, started=True)
    assert "Engine 0 has made no step" in serving.state.reason
    assert "3 one-token requests had no answer" in serving.state.reason


def test_a_sample_more_is_no_second_more():
    course = Course()
    course.see(one(5, running=1))
    while course.state.name != "dead":
        course.see(one(5, running=1), after=0.25)
    assert course.now - TICK == LIMITS.busy_quiet_s + 3 * LIMITS.canary_s


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_the_shortest_limits_are_limits_too(seconds):
    limits = Limits(stall_s=seconds, start_stall_s=seconds)
    for sample, then in ((one(5), one(5, running=1)), (still(), still())):
        course = Course(limits)
        course.see(sample)
        assert course.until("dead", then) <= limits.dead_after_s
        assert not course.told.live


def test_what_appears_for_the_first_time_is_no_step():
    course = Course()
    course.see(Sample(health="ok", engines={"0": Engine(steps={KV: 0.0})}))
    course.see(one(5))
    assert course.state.engines["0"].quiet_s == TICK


def test_the_documented_bounds_hold_for_the_default_limits():
    assert (LIMITS.unready_after_s, LIMITS.dead_after_s) == (260.0, 325.0)


def test_requests_that_wait_while_none_runs_are_doubted_as_soon_as_an_idle_engine(serving):
    assert serving.until("stalled", one(5, waiting=4)) == LIMITS.idle_quiet_s + 2 * LIMITS.canary_s


def test_each_strike_is_a_new_canary(serving):
    seen = []
    while serving.state.name != "dead":
        serving.see(one(5, running=1))
        seen += [number for number in state.canaries(serving.state).values() if number not in seen]
    assert seen == [1, 2, 3, 4]


def test_the_doubt_is_said(serving):
    serving.until("suspect", one(5, running=2, waiting=1))
    assert serving.told.ready
    quiet = "Engine 0 has made no step for {} s with {} requests running and 1 waiting; "
    assert serving.state.reason == quiet.format(120, 2) + "a one-token request has waited for 0 s."
    serving.see(one(5, running=3, waiting=1))
    assert serving.state.reason == quiet.format(125, 3) + "a one-token request has waited for 5 s."
    while not serving.state.engines["0"].strikes:
        serving.see(one(5, running=3, waiting=1))
    assert serving.state.reason == (
        quiet.format(180, 3) + "a one-token request has waited for 0 s, one before it had no answer."
    )


def test_a_strike_is_said_even_when_no_other_canary_is_out(serving):
    while not serving.state.engines["0"].strikes:
        serving.see(one(5))
    serving.see(one(5, Canary("inconclusive", "503")))
    while state.canaries(serving.state):
        serving.see(one(5))
    assert serving.state.name == "suspect"
    assert serving.state.reason == (
        "Engine 0 has made no step for 0 s with 0 requests running and 0 waiting; a one-token request had no answer."
    )


@pytest.mark.parametrize("change", [{"tokens": 6}, {"kv": 0.5}, {"tokens": 0}])
def test_any_step_clears_every_doubt(serving, change):
    serving.until("stalled", one(5, running=1))
    serving.see(one(**{"tokens": 5, "running": 1, **change}))
    assert serving.state.name == "ready"
    assert state.canaries(serving.state) == {}


def test_frozen_gauges_of_an_idle_engine_are_no_death(serving):
    """As after an abort of all requests (vllm-project/vllm#22545): running stays, and a canary is answered."""
    frozen = one(5, running=106)
    serving.until("suspect", frozen)
    serving.see(msgspec.structs.replace(frozen, canaries={"0": Canary("answered")}))
    assert serving.state.name == "ready"


def test_a_long_chunked_prefill_moves_the_cache_alone(serving):
    for step in range(1000):
        serving.see(one(5, running=1, kv=step / 1000))
        assert serving.state.name == "ready"


def test_overload_is_saturation_and_fails_nothing(serving):
    for step in range(1000):
        serving.see(one(step, running=256, waiting=2000, kv=1.0))
        assert serving.state.name == "saturated"
        assert serving.told == state.Verdicts(live=True, ready=True, started=True)
    assert serving.state.reason == ("vLLM serves as much as it can: 256 requests run, 2000 wait, KV cache 100% full.")


@pytest.mark.parametrize("stuck", ["0", "1"])
def test_of_several_engines_the_stuck_one_is_found(stuck):
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
        f"Engine {stuck} has made no step for 300 s with 1 requests running and 1 waiting, "
        "and 3 one-token requests had no answer: it hangs."
    )
    assert course.now <= LIMITS.dead_after_s


def test_saturated_is_when_every_engine_has_requests_waiting():
    course = Course()
    course.see(Sample(health="ok", engines={"0": engine(1, waiting=9), "1": engine(1)}))
    assert course.state.name == "ready"
    course.see(Sample(health="ok", engines={"0": engine(1, waiting=9), "1": engine(1, waiting=1)}))
    assert course.state.name == "saturated"


def test_an_engine_that_is_no_longer_shown_is_no_longer_watched():
    course = Course()
    course.see(Sample(health="ok", engines={"0": engine(), "1": engine()}))
    course.see(Sample(health="ok", engines={"0": engine(1)}))
    assert list(course.state.engines) == ["0"]


def test_metrics_that_do_not_answer_hide_no_hang(serving):
    silent = Sample(health="unanswered")
    assert serving.until("dead", silent) <= LIMITS.dead_after_s


def test_metrics_that_answer_late_are_a_step(serving):
    for step in range(1000):
        serving.see(one(step, running=1) if step % 20 == 0 else Sample(health="unanswered"))
        assert serving.state.name == "ready"


def test_one_hung_api_server_of_several_does_not_hide_the_engines_steps(serving):
    """A connection may land at it, and then nothing comes back; what the others show is of all of them."""
    for step in range(1000):
        serving.see(Sample(health="unanswered") if step % 2 else one(step, running=1))
        assert serving.state.name == "ready"


def test_half_an_exposition_is_no_step(serving):
    half = Sample(health="ok", engines={"0": Engine(steps={KV: 0.0}, running=1)})
    serving.until("suspect", half)
    serving.see(one(5, running=1))
    assert serving.state.name == "suspect"


@pytest.mark.parametrize("engines", [None, {"0": Engine(steps={KV: 0.0}, running=8, waiting=56)}], ids=["none", "half"])
def test_metrics_that_cannot_be_read_prove_no_hang_while_health_answers(serving, engines):
    """An engine full to the brim answers no canary in time either: it waits behind the other requests."""
    serving.see(one(6, running=8, waiting=56))
    unread = Sample(health="ok", engines=engines)
    serving.stays({"saturated", "suspect"}, unread, 10_000)
    assert serving.told.ready
    assert serving.state.name == "suspect"
    assert serving.state.reason.endswith(" s, /metrics cannot be read meanwhile.")
    assert serving.until("dead", one(6, running=8, waiting=56)) <= 4 * LIMITS.canary_s
    assert "/metrics" not in serving.state.reason


def test_one_answer_of_health_is_enough_to_know_that_the_api_server_lives(serving):
    serving.see(one(6, running=8))
    samples = [Sample(health="unanswered")] * int(LIMITS.canary_s / TICK - 1) + [Sample(health="ok")]
    for sample in samples * 20:
        serving.see(sample)
        assert serving.told.live


def test_one_whole_exposition_is_enough_to_know_that_the_engine_makes_no_step(serving):
    serving.see(one(6, running=8))
    samples = [Sample(health="ok")] * int(LIMITS.canary_s / TICK - 1) + [one(6, running=8)]
    for sample in samples * 20:
        serving.see(sample)
    assert serving.state.name == "dead"


def test_without_step_counters_only_the_api_server_is_watched():
    course = Course()
    blind = Sample(health="ok", engines={})
    course.stays({"ready"}, blind, 10_000)
    assert course.state.reason == (
        "vLLM serves; its /metrics shows no engine, so an engine that hangs would not be seen."
    )
    assert state.canaries(course.state) == {}
    course.until("stalled", Sample(health="unanswered", engines=None))
    assert course.state.reason == (
        "The API server has answered nothing for 180 s, and 2 one-token requests had no answer: it hangs."
    )


def test_vllm_that_calls_its_engine_dead_is_believed(serving):
    serving.see(one(6, health="engine dead"))
    assert serving.state.name == "dead"
    assert serving.state.reason == "vLLM says that its engine is dead (503 of /health)."


def test_stall_0_suspects_nobody():
    course = Course(Limits(stall_s=0))
    course.see(one(5))
    course.stays({"ready"}, one(5, running=1), 10_000)


# ---- what a canary is answered


def test_a_refused_canary_is_the_last_one_and_never_a_strike(serving):
    serving.until("suspect", one(5, running=1))
    serving.see(one(5, Canary("refused", "401 of /v1/completions: no key"), running=1))
    serving.stays({"suspect"}, one(5, running=1), 10_000)
    assert serving.told.ready
    assert serving.state.canary_off == "401 of /v1/completions: no key"
    assert serving.state.reason.startswith("Engine 0 has made no step for 10")
    assert "no one-token request can tell why (401 of /v1/completions: no key)" in serving.state.reason
    assert state.canaries(serving.state) == {}
    serving.see(one(6))
    assert serving.state.name == "ready"
    serving.stays({"ready"}, one(6), 10_000)


def test_each_canary_has_a_number_of_its_own_so_that_a_late_answer_is_told_apart(serving):
    numbers = []
    for canary in (Canary("answered"), Canary("inconclusive", "503"), Canary("paused"), None) * 2:
        while not state.canaries(serving.state):
            serving.see(one(5))
        numbers.append(state.canaries(serving.state)["0"])
        serving.see(one(5, canary))
        while state.canaries(serving.state).get("0") == numbers[-1]:
            serving.see(one(5))
        serving.see(one(5 if canary else serving.now))
    assert numbers == sorted(set(numbers))


def test_a_strike_is_not_forgotten_for_an_answer_that_tells_nothing(serving):
    serving.until("suspect", one(5))
    serving.see(one(5, Canary("inconclusive", "503")))
    while state.canaries(serving.state):
        serving.see(one(5))
    assert serving.until("stalled", one(5)) == LIMITS.idle_quiet_s + LIMITS.canary_s


def test_an_engine_that_cannot_be_asked_is_suspected_when_it_would_have_been_asked(serving):
    serving.until("suspect", one(5, running=1))
    serving.see(one(5, Canary("refused", "401"), running=1))
    serving.see(one(6, running=1))
    assert serving.until("suspect", one(6, running=1)) == LIMITS.busy_quiet_s


def test_a_full_front_end_is_a_strike_only_while_the_engine_has_work(serving):
    """503 of admission control comes from the API server, not from the engine (entrypoints of 0.32.0)."""
    full = Canary("inconclusive", "503")
    while serving.now < 10_000:
        asked = bool(state.canaries(serving.state))
        assert serving.see(one(5, full if asked else None)).name == "ready"
    while serving.state.name != "dead":
        asked = bool(state.canaries(serving.state))
        serving.see(one(5, full if asked else None, running=1))
    assert serving.now - 10_000 <= LIMITS.dead_after_s


def test_an_inconclusive_answer_is_given_the_whole_time_before_it_counts(serving):
    serving.until("suspect", one(5, running=1))
    serving.see(one(5, Canary("inconclusive", "500"), running=1))
    assert serving.until("stalled", one(5, running=1)) >= 2 * LIMITS.canary_s - 2 * TICK


def test_paused_is_as_it_was_told_to_be(serving):
    paused = Canary("paused")
    for _ in range(10_000):
        asked = bool(state.canaries(serving.state))
        serving.see(one(5, paused if asked else None, waiting=3))
        assert serving.told.live
    assert serving.state.name == "asleep"
    assert serving.state.reason == (
        "vLLM is paused, as it was told to be: it serves nothing until it is told to go on."
    )
    serving.see(one(6))
    assert serving.state.name == "ready"


def test_an_answer_tells_that_the_pause_is_over(serving):
    serving.until_asked(one(5))
    serving.see(one(5, Canary("paused")))
    assert serving.state.name == "asleep"
    serving.see(one(5, Canary("answered")))
    assert serving.state.name == "ready"


def test_a_pause_is_remembered_where_another_engine_switches_the_canary_off():
    course = Course()
    both = Sample(health="ok", engines={"0": engine(5), "1": engine(5)})
    course.see(both)
    course.until_asked(both)
    course.see(msgspec.structs.replace(both, canaries={"0": Canary("paused"), "1": Canary("paused")}))
    assert course.state.name == "asleep"
    course.see(msgspec.structs.replace(both, canaries={"1": Canary("refused", "401")}))
    assert course.state.engines["0"].paused


def test_asleep_is_not_ready_and_not_asked(serving):
    serving.stays({"asleep"}, one(5, asleep=True), 10_000)
    assert serving.told == state.Verdicts(live=True, ready=False, started=True)
    assert state.canaries(serving.state) == {}
    assert serving.state.reason.startswith("vLLM is asleep, as it was told to be")
    assert serving.see(one(5)).name == "ready"


# ---- drains, ends, GPUs


def test_a_drain_is_not_ready_but_live_and_sends_no_canary(serving):
    serving.stays({"draining"}, one(5, running=1, draining="SIGTERM came."), 10_000)
    assert serving.state.reason == "SIGTERM came."
    assert serving.told == state.Verdicts(live=True, ready=False, started=True)
    assert state.canaries(serving.state) == {}
    serving.see(Sample(health="refused", draining="SIGTERM came."))
    assert serving.told.started


def test_an_end_is_death_with_its_reason(serving):
    serving.see(Sample(health="refused", ended="vLLM exited with 1.", draining="SIGTERM came."))
    assert (serving.state.name, serving.state.reason) == ("dead", "vLLM exited with 1.")


def test_a_port_that_is_closed_again_is_a_new_start(serving):
    """Beside a sidecar vLLM's container restarts by itself; failing its liveness would only kill the new one."""
    serving.until("dead", one(5, running=1))
    serving.see(Sample(health="refused"))
    assert serving.state.name == "starting"
    assert serving.told == state.Verdicts(live=True, ready=False, started=False)
    serving.see(one(0))
    assert serving.state.name == "ready"
    assert serving.state.start_s == TICK


@pytest.mark.parametrize(("kills", "live"), [(False, True), (True, False)])
def test_a_fatal_gpu_fault_is_not_ready_and_dead_only_where_asked_for(kills, live):
    course = Course(Limits(gpu_fault_kills=kills))
    course.see(one(5))
    course.see(one(6, gpu_faults=("GPU 1: Xid 79, the GPU has fallen off the bus", "GPU 2: lost")))
    assert course.state.name == "gpu_fault"
    assert course.told == state.Verdicts(live=live, ready=False, started=True)
    assert course.state.reason == (
        "GPU 1: Xid 79, the GPU has fallen off the bus; GPU 2: lost: vLLM is out of rotation, and a restart mends no GPU."
    )
    course.until("dead", one(6, gpu_faults=("GPU 1",)))
    assert not course.told.live


def test_every_state_has_its_metric():
    assert set(metrics.STATES) == set(state.Name.__args__)


# ---- what no course of things may bring about

COUNTS = st.integers(0, 5)
ANSWERS = st.sampled_from([None, Canary("answered"), Canary("inconclusive", "503"), Canary("refused", "401")])
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
        health=draw(st.sampled_from(["ok", "refused", "unanswered", "engine dead"])),
        engines=engines,
        canaries={name: answer for name in (engines or ()) if (answer := draw(ANSWERS))},
        movement=draw(st.none() | st.builds(Movement, lines=COUNTS)),
        draining=draw(st.none() | st.just("drain")),
        gpu_faults=draw(st.just(()) | st.just(("fault",))),
    )  # fmt: skip


@given(st.lists(st.tuples(samples(), st.floats(-1e6, 1e6)), max_size=60))
def test_no_course_breaks_it_and_its_numbers_stay_sane(course):
    life = Course()
    for sample, after in course:
        life.see(sample, after=after)
        assert life.state.reason.endswith(".") or life.state.reason == "drain"
        assert all(watch.quiet_s >= 0 and watch.strikes >= 0 for watch in life.state.engines.values())
        assert life.told.live or life.state.name in {"dead", "gpu_fault"}
        if life.told.ready:
            assert life.state.started


@given(
    st.lists(st.tuples(st.sampled_from(["ok", "unanswered"]), COUNTS, COUNTS, ANSWERS, st.floats(0, 1e6)), max_size=200)
)
def test_with_progress_in_every_sample_it_is_never_dead(course):
    life = Course()
    for step, (health, running, waiting, answer, after) in enumerate(course):
        life.see(one(step, answer, health=health, running=running, waiting=waiting), after=after)
        assert life.state.name in {"starting", "ready", "saturated"}


@given(st.data(), st.integers(0, 9), st.integers(0, 9))
def test_a_stuck_engine_is_dead_within_the_bound_whatever_its_gauges_say(data, running, waiting):
    """Gauges may be frozen at anything; samples come on time or early, answers not at all."""
    life = Course()
    life.see(one(5, running=running, waiting=waiting))
    began, unready = life.now, None
    while life.state.name != "dead":
        silent = data.draw(st.booleans())
        life.see(
            Sample(health="unanswered") if silent else one(5, running=running, waiting=waiting),
            after=data.draw(st.floats(2, TICK)),
        )
        assert life.now - began <= LIMITS.dead_after_s
        unready = unready or (life.now if not life.told.ready else None)
    assert unready - began <= LIMITS.unready_after_s


@given(
    st.lists(st.floats(0, 1e9), max_size=int((LIMITS.idle_quiet_s + 3 * LIMITS.canary_s) / LIMITS.longest_gap_s) - 1)
)
def test_a_prober_that_was_stopped_blames_nobody_for_the_time_it_did_not_watch(gaps):
    life = Course()
    life.see(one(5))
    for gap in gaps:
        life.see(one(5, running=1), after=gap)
        assert life.state.name != "dead"


@given(st.lists(samples(), max_size=60), st.floats(-1e9, 1e9))
def test_no_verdict_depends_on_what_the_clock_shows(course, shift):
    here, there = Course(), Course(at=float(round(shift)))
    for sample in course:
        assert here.see(sample).name == there.see(sample).name
        assert here.told == there.told
