"""The explorer: the kernel's own source under chosen interleavings, with every access to memory watched.

What runs is a `spec`, `worlds` have names, and a `world` has a spec's arrays, with `hosts` that make the calls.
`strategies` choose the interleaving, or `choice_tree` all of them, by `source_sets`. `watched` gives the verbs their
watched meaning: `memory` sees every access, and `words` says what a load may read. `blame` judges calls that are given
up: who may, whom it names, and what hosts read of it. `checks` judge a run, with `reports`; `search` makes many runs on
all cores, `exhaustive` all there are, and `hunt` those that it takes to find one of `plants`, bugs put in on purpose.
Of a run that fails, `history` and `telling` say what happened, `waiting` who waits for what, and `cells` what words
mean; `shrink` makes it small, by `schedules` and `ddmin`; and `cases` keep it in a file.

A lane of a block runs as a *fiber* (device/fibers.py), a new one in each call; its *actor* is what `memory` knows of
it. The exhaustive search calls it a *thread*, as its literature does.
"""
