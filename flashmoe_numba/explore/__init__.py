"""The explorer: the kernel's own source under chosen interleavings, with every access to memory watched.

`run/` is one run. What runs is a `spec`, whose `program` says which calls are forwards and which backwards; a `world`
has its `arrays`, made by a `backend`, with `hosts` that make the `calls`. `watched` gives the verbs their watched
meaning: `memory` sees every access, and `words` says what a load may read. `blame` judges calls that are given up: who
may, whom it names, and what hosts read of it. `checks` judge a run, with `counts` of tasks, `gradients` and `reports`;
`waiting` says who waits for what, and `cells` what words mean.

`choose/` is who goes next: `strategies` by seed, `schedules` that are given, or `choice_tree` all of them, by
`source_sets`.

`worlds` have names, those of `backward_worlds` among them, and `plants` are bugs put in on purpose. `search` makes many
runs on all cores, `exhaustive` all there are, and `hunt` those that it takes to find a plant.

`tell/` is what becomes of a run that fails: `history` and `telling` say what happened; `shrink` makes it small, by
`ddmin`; and `cases` keep it in a file.

A lane of a block runs as a *fiber* (device/fibers.py), a new one in each call; its *actor* is what `memory` knows of
it. The exhaustive search calls it a *thread*, as its literature does.
"""
