"""Why some plants cannot show: by their rule, and by the word of the protocol that their line is about.

docs/protocol.md says what each word brings and to whom.
"""

from ptx_faults_text import BY_TEXT
from ptx_faults_words import word_of

COUNTS_ONLY = {"HEAD", "TAIL", "HIDDEN_ROWS", "PROGRESS", "trace"}
OF_ONE_BLOCK = {"GEMM_TASKS", "PACKETS_SEEN", "HIDDEN_ROWS", "needs_left", "trace"}
OF_ONE_RANK = {"stamp", "HEAD", "TAIL", "GATES_DONE", "GATE_OPEN", "TOTAL", "up_done", "down_done", "left", "RECORD"}
RECORDS = (
    "Only hosts read records, those of this process after the launch. Other processes' hosts rely on it "
    "(docs/protocol.md, give_up), but what they read is not watched here."
)
ALONE = "Only lanes of one block touch it (docs/protocol.md), so that any scope is wide enough."
OWN = "Only blocks of one rank touch it (docs/protocol.md), which are of one launch and share a GPU."
COUNTS = "It only counts: nobody reads what another thread wrote because of its value."
REASONS = {
    **{(rule, word): COUNTS for rule in ("`.release` removed", "`.acquire` removed") for word in COUNTS_ONLY},
    **{("`.sys` made `.gpu`", word): ALONE for word in OF_ONE_BLOCK},
    **{("`.sys` made `.gpu`", word): OWN for word in OF_ONE_RANK},
    **{(rule, word): RECORDS for rule in ("`.release` removed", "`.acquire` removed") for word in ("ABORT", "RECORD")},
    ("`.release` removed", "GEMM_TASKS"): "Its value is brought by PACKETS_SEEN, which releases.",
    ("`.acquire` removed", "GEMM_TASKS"): "Its value is brought by PACKETS_SEEN; what is added says nothing else.",
    ("`.release` removed", "TOTAL"): "It is a number, and nothing else is read because of it.",
    ("`.acquire` removed", "TOTAL"): "It is a number, and nothing else is read because of it.",
    ("`.release` removed", "SILENT"): "It is a number, and nothing else is read because of it.",
}
LEADING = (
    "K major and a swizzle of 128 bytes: one product's depth lies within a swizzled row, and the leading offset is not "
    "used (9.7.15.5.1.2.1.1)."
)


def reason(plant, lines):
    """Why a plant cannot show, or None. `lines` are those of the variant's text."""
    if (plant.rule, plant.what) == ("a descriptor's bit flipped", "leading offset"):
        return LEADING
    if plant.rule in BY_TEXT:
        return BY_TEXT[plant.rule](lines, plant.line, plant.variant)
    word = word_of(lines, plant.line, plant.variant)
    why = REASONS.get((plant.rule, word))
    return f"{word}: {why}" if why else None
