"""The explorer: the kernel's own source under chosen interleavings, with every access to memory watched.

`strategies` choose the interleaving, `memory` watches, `watched` gives the verbs their watched meaning, `world` is what
runs, `checks` judges a run, and `search` does many of them on all cores. Of a run that fails, `history` and `telling`
say what happened; `shrink` makes it small, by `schedules` and `ddmin`; and `cases` keep it in a file.
"""
