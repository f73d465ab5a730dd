"""Run the kernel's own source under many interleavings of a small world, with every access to memory watched.

A run is clean if nothing raced, no cell was read before it was written, no index was out of bounds, no rank wrote where
another's rows belong, nobody waits for ever, every task ran once, and the results are the reference's, with the same
bits under every seed. Without flags seeds take all of --list-worlds in turn. The first seed that is not clean is
reported, with what happened in it and the command that replays it; exit status 1. --shrink makes of it a small world
with few switches, in a file for --replay.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, fields, replace
from itertools import islice
from typing import Any

from reference import DTYPES, MoEConfig
from reference.layout import SAVES
from reference.runs import PACKINGS

from ..errors import UsageError
from ..explore.choose.strategies import STRATEGIES
from ..explore.exhaustive import EXHAUSTIVE, check_search, explore_all
from ..explore.plants import PLANTS
from ..explore.run.program import Astray, Program
from ..explore.run.spec import OF_BACKWARDS, Lost, WorldSpec
from ..explore.search import SEEDS_PER_BATCH, Outcome, Search, explore, search_of
from ..explore.worlds import PLAIN, WORLDS
from ..processes import launch
from ..processes.pools import Pool
from .explored import as_json, count, describe, lines, replay_command
from .failures import add_failure_arguments, describe_world, replay, shrink, tell
from .flags import blaming, in_flags, integer
from .outputs import add_json_argument, check_outputs, give, write_json
from .spread import add_jobs_argument, num_processes, open_pool, progress, stopped_status, why_stopped

SEEDS = 100
MOST_SEEDS = 1_000_000  # all are handed to the processes at once; --seed goes on from there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `flashmoe explore`. What changes a world has the name of its field in WorldSpec or MoEConfig."""
    what = "a small world by its name, or all of them, which seeds take in turn; then changes of them, where these fit"
    group = parser.add_argument_group("world", what)
    add = group.add_argument
    add("--world", metavar="NAME", help="one of --list-worlds [all in turn; plain with exhaustive]")
    for name, what in (
        ("num_ranks", "ranks of expert parallelism; must divide the experts"),
        ("num_processors", "processor blocks of a rank, beside its OS block"),
        ("lanes", "threads of a block; races that block barriers prevent need two [1 with exhaustive]"),
        ("num_tokens", "most tokens of a rank"),
        ("num_experts", "experts over all ranks"),
        ("num_topk", "experts of each token"),
        ("hidden", "row length of a token"),
        ("ffn", "row length inside an expert"),
        ("capacity", "most rows from one rank to one expert"),
        ("epochs", "calls in a row; later ones have fewer tokens on some ranks, or routing from outside"),
    ):
        add(f"--{name.removeprefix('num_')}", dest=name, type=integer(1), metavar="N", help=what)
    add("--dtype", choices=DTYPES, help=", ".join(DTYPES))
    add("--gated", action=argparse.BooleanOptionalAction, help="act(gate) * up instead of act(up)")
    add("--renormalize", action=argparse.BooleanOptionalAction, help="weights of a token add up to 1")
    add("--ties", action=argparse.BooleanOptionalAction, help="every other expert has the logits of the one before it")
    what = "sources: rows of several share row tiles; none: each packet has its own"
    add("--packing", choices=PACKINGS, help=what)
    what = "that the ranks are spread over: between them a network carries puts, late and in any order that is allowed"
    add("--hosts", type=integer(1), metavar="N", help=what)
    add("--data-seed", type=integer(0), metavar="N", help="of weights, tokens, counts and routing")
    add("--save", choices=SAVES, help="what forwards keep for their backwards")
    what = "calls: 0 for a forward, N for the backward of call N: 0,0,2,1 for two of each"
    add("--program", type=_program, metavar="N,...", help=what)
    what = "backwards are given gradients of the logits, too, by way of other losses"
    add("--logits-gradient", action=argparse.BooleanOptionalAction, help=what)
    for part in ("experts", "router"):
        what = f"backwards make no gradients of the weights of the {part}"
        add(f"--frozen-{part}", action=argparse.BooleanOptionalAction, help=what)
    what = "this rank, or several, makes a forward as its last call, or the backward of CALL, where others do not"
    add("--astray", type=_astray, action="append", metavar="RANK[:CALL]", help=what)
    what = "this rank, or several, gives up in the last call, and all must stop"
    add("--leaver", dest="leavers", type=integer(0), action="append", metavar="RANK", help=what)
    what = "this rank, or several, is lost in a call (the last one) after so many tasks (0: it never begins the call)"
    add("--lost", type=_lost, action="append", metavar="RANK[:CALL[:TASKS]]", help=what)
    add("--deadline", type=integer(1), metavar="N", help="of waits, in switches; none: who waits for ever is told")
    what = "all blocks are one launch, as on a GPU, and calls follow each other"
    add("--grid", action=argparse.BooleanOptionalAction, help=what)
    _add_search(parser)
    add_failure_arguments(parser.add_argument_group("a run that is not clean").add_argument)
    add_json_argument(parser)


def _lost(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"must be RANK, RANK:CALL or RANK:CALL:TASKS, got {text!r}")
    return tuple(map(int, parts))


def _program(text: str) -> Program:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be N,..., got {text!r}")
    return tuple(map(int, text.split(",")))


def _astray(text: str) -> Astray:
    if not re.fullmatch(r"\d+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be RANK or RANK:CALL, got {text!r}")
    return Astray(*map(int, text.split(":")))


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("search").add_argument
    what = "who runs next, and when it gives way; exhaustive: all of a very small world, in one process [random]"
    add("--strategy", choices=(*STRATEGIES, EXHAUSTIVE), default="random", help=what)
    add("--depth", type=integer(1), default=3, metavar="N", help="of the bugs that pct looks for [3]")
    add("--seed", type=integer(0), default=0, metavar="N", help="first seed [0]")
    add("--seeds", type=integer(1), metavar="N", help="how many [100]; of exhaustive, the most runs [no limit]")
    add_jobs_argument(add)
    what = "loads of atomic words may be late [yes; not with exhaustive]"
    add("--weak", action=argparse.BooleanOptionalAction, help=what)
    add("--plant", metavar="NAME", help="put this bug into the kernel first: found if the world shows it")
    add("--list-plants", action="store_true", help="say which bugs there are, and run nothing")
    add("--list-worlds", action="store_true", help="say which worlds there are, and run nothing")


def main(args: argparse.Namespace) -> int:
    """Run what the flags describe."""
    check_outputs({"--json": args.json, "--shrink": args.shrink})
    if args.list_plants:
        return _list_plants(args.json)
    if args.list_worlds:
        return _list_worlds(args.json)
    if args.replay is not None:
        return replay(args) if launch.is_first_rank() else 0
    searches = make_searches(args)
    if args.strategy == EXHAUSTIVE:
        return _explore(args, searches, None, None) if launch.is_first_rank() else 0
    seeds = range(args.seed, args.seed + (args.seeds or SEEDS))
    few = len(seeds) <= SEEDS_PER_BATCH or (args.plant and args.jobs is None)  # a planted bug shows soon
    with open_pool(1 if few and not launch.inside_mpirun() else args.jobs) as pool:
        return _explore(args, searches, seeds, pool) if launch.is_first_rank() else 0


def _explore(args: argparse.Namespace, searches: dict[str, Search], seeds: range | None, pool: Pool | None) -> int:
    """Seeds, or all that there is."""
    if args.json != "-":
        print(describe(searches), flush=True)
    several = list(searches.values())
    if seeds is None:
        tally = count(progress(islice(explore_all(several[0]), args.seeds), args.seeds, "runs"))
    else:
        tally = count(progress(explore(several, seeds, pool), len(seeds), "runs"))
    if args.json != "-":
        print("\n".join(lines(args, searches, tally)), flush=True)
    search = search_of(several, tally.bad.seed) if tally.bad else several[0]
    found = _look_closer(args, search, tally.bad) if tally.bad else {}
    if args.json:
        write_json(args.json, as_json(args, searches, search, num_processes(pool), tally) | found)
    if tally.stop:
        state = f"{tally.runs} runs are done"
        if seeds is not None:
            state = f"{tally.runs} of {len(seeds)} runs are done, and --seed {seeds[0] + tally.runs} goes on from there"
        print(f"flashmoe explore: {why_stopped(tally.stop)}; {state}", file=sys.stderr)
        return stopped_status(tally.stop)
    return 1 if tally.bad else 0


def _look_closer(args: argparse.Namespace, search: Search, bad: Outcome) -> dict[str, Any]:
    """Tell of a bad run, or of what it can be shrunk to; for JSON, of both."""
    say = print if args.json != "-" else lambda *lines, **_: None
    replay, story = f"replay: {replay_command(args.argv, search, bad.seed)}", None
    try:
        if args.json or (args.history and args.shrink is None):
            story = tell(search, bad)
        if story and args.shrink is None:
            for line in story.text(args.history):
                say(line)
    finally:  # also when Ctrl-C ends the telling
        say(replay, flush=True)
    found = story.as_json() if story else {}
    if args.shrink is None:
        return found
    shrunk = shrink(search, bad, args.shrink)
    say(*shrunk.text(args.shrink, args.history), sep="\n", flush=True)
    return found | {"shrunk": shrunk.as_json()}


def make_searches(args: argparse.Namespace) -> dict[str, Search]:
    """What the flags describe, by the names of the worlds that they change.

    Raises:
        UsageError: they fit no layer, or there is no such world, rank or plant.
    """
    if args.plant is not None and args.plant not in PLANTS:
        raise UsageError(f"argument --plant: there is no {args.plant!r}; see --list-plants")
    if args.seeds is not None and args.seeds > MOST_SEEDS:
        raise UsageError(f"argument --seeds: must be at most {MOST_SEEDS}, got {args.seeds}")
    if args.strategy == EXHAUSTIVE:
        _check_exhaustive(args)
    weak = args.strategy != EXHAUSTIVE if args.weak is None else args.weak
    how = dict(strategy=args.strategy, depth=args.depth, plant=args.plant, weak=weak)
    searches = {name: Search(spec=spec, **how) for name, spec in _specs(args).items()}
    for name, search in searches.items():
        if args.strategy == EXHAUSTIVE:
            with blaming(f"argument --world: {name!r}"):
                check_search(search)
    return searches


def _specs(args: argparse.Namespace) -> dict[str, WorldSpec]:
    """The worlds that the flags fit."""
    specs, wrong = {}, []
    for name in _world_names(args):
        try:
            specs[name] = _changed(WORLDS[name], args)
        except (TypeError, ValueError) as error:
            wrong.append(str(error))
    if not specs:
        raise UsageError(_in_flags(wrong[0]))
    return specs


def _in_flags(message: str) -> str:
    """A message of WorldSpec in the words of the command line."""
    for name in ("lost", "grid", "hosts", "deadline", "save", "program", "astray", *OF_BACKWARDS):
        flag = f"--{name.replace('_', '-')}"
        message = re.sub(rf"^{name}\b|(?<=needs a ){name}|(?<=needs ){name}\b", flag, message)
    return in_flags(re.sub(r"^leavers", "--leaver", message)).replace("num_processors", "--processors")


def _world_names(args: argparse.Namespace) -> list[str]:
    if args.world is None:
        return [PLAIN] if args.strategy == EXHAUSTIVE else list(WORLDS)
    if args.world not in WORLDS:
        hint = f"; the seed of what a world holds is --data-seed {args.world}" if args.world.isdigit() else ""
        raise UsageError(f"argument --world: there is no {args.world!r}; see --list-worlds{hint}")
    return [args.world]


def _changed(spec: WorldSpec, args: argparse.Namespace) -> WorldSpec:
    """The world with what is given; it may fit no layer."""
    config, changes = _given(args, MoEConfig), _given(args, WorldSpec)
    if args.strategy == EXHAUSTIVE:
        changes = {"lanes": 1} | changes
    if "leavers" in changes:
        changes["leavers"] = tuple(changes["leavers"])
    if "astray" in changes:
        changes["astray"] = tuple(changes["astray"])
    if "program" in changes:
        changes = {"epochs": len(changes["program"])} | changes
    if "lost" in changes:
        last = changes.get("epochs", spec.epochs)
        changes["lost"] = tuple(Lost(*lost) if len(lost) > 1 else Lost(lost[0], last) for lost in changes["lost"])
    return replace(spec, config=replace(spec.config, **config), **changes)


def _given(args: argparse.Namespace, kind: type[MoEConfig | WorldSpec]) -> dict[str, Any]:
    """By field of this kind, the flags that are."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _check_exhaustive(args: argparse.Namespace) -> None:
    given = {"--weak": args.weak, "--leaver": args.leavers, "--lost": args.lost, "--deadline": args.deadline}
    given |= {"--grid": args.grid, "--seed": args.seed, "--jobs": args.jobs}
    for flag in [flag for flag, value in given.items() if value]:
        raise UsageError(f"argument {flag}: not with --strategy {EXHAUSTIVE}")
    if args.lanes not in (None, 1):
        raise UsageError(f"argument --lanes: must be 1 with --strategy {EXHAUSTIVE}, got {args.lanes}")


def _list_plants(json: str | None) -> int:
    plants = PLANTS.values()
    name, file = max(map(len, PLANTS)), max(len(each.file) for each in plants)
    table = (f"{each.name:{name}} {each.file:{file}} {each.summary} [{', '.join(each.found_by)}]" for each in plants)
    give(json, table, [asdict(plant) for plant in plants])
    return 0


def _list_worlds(json: str | None) -> int:
    width = max(map(len, WORLDS))
    table = (f"{name:{width}}  {describe_world(spec)}" for name, spec in WORLDS.items())
    give(json, table, [{"name": name} | asdict(spec) for name, spec in WORLDS.items()])
    return 0
