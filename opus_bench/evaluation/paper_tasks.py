"""The paper's benchmark suites: which items, which prompts, and what the paper leaves open.

Item counts name the splits. The paper's counts (Section "evaluation") against the published sizes of the splits:

    MMLU 14,042           test (validation has 1,531)
    HellaSwag 10,042      validation (the test labels are hidden)
    PIQA 1,838            validation (test: 3,084, hidden)
    SIQA 1,954            validation
    WinoGrande 1,267      validation (test: 1,767, hidden)
    CommonsenseQA 1,221   validation (test: 1,140, hidden)
    WSC 104               SuperGLUE's validation alone (training, 554, and test, 146, would be others)
    RACE 1,436, 3,498     test, middle and high school, one item a question (lm-eval's `race` has 1,045, one a passage)
    AX-b 1,104, AX-g 356  SuperGLUE's two diagnostic sets, whole
    StoryCloze 1,871      of 2016; validation and test have as many each. XStoryCloze publishes the validation
                          set in English as 360 + 1,511 = 1,871 items, the test set is handed out on request only
    ARC-E 567, ARC-C 295  three and four fewer than validation (570, 299). OpenCompass, whose loader of ARC keeps
                          the questions of four options only, explains both: that rule is applied here

That the paper used OpenCompass is an inference from these counts, the names AX-b and AX-g and the rule of the lowest
mean negative log-likelihood; the paper does not say so, nor over which tokens it takes the mean. The rule here is over
the option's tokens, as lm-eval conditions on the question. A mean over the question's tokens too would choose the same
among options of equal length, and how often otherwise is not known. No count above is taken on trust: each run compares
its own with the paper's and says so in the row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTask:
    """One benchmark: lm-eval's tasks, groups or tags for it, and the paper's number of items.

    n is None where the paper states none; `notes` say what is open or done otherwise; with `by_part` the value is the
    unweighted mean over parts, otherwise items are pooled. `private` is the reason why no public copy can be loaded:
    such a task runs on local files alone.
    """

    name: str
    lm_eval: tuple[str, ...]
    n: int | None
    notes: tuple[str, ...] = ()
    by_part: bool = False
    private: str | None = None


PROMPTS = "prompts are lm-eval's; the paper's are not published"
PAPER_TASKS = (
    PaperTask("MMLU", ("mmlu_continuation",), 14042,
              (PROMPTS, "items pooled over subjects; `parts` has each subject")),
    PaperTask("ANLI", ("anli_r1", "anli_r2", "anli_r3"), None,
              (PROMPTS, "test splits of the three rounds, 1,000 + 1,000 + 1,200; development has as many")),
    PaperTask("HellaSwag", ("hellaswag",), 10042, (PROMPTS,)),
    PaperTask("PIQA", ("piqa",), 1838, (PROMPTS,)),
    PaperTask("SIQA", ("social_iqa",), 1954, (PROMPTS,)),
    PaperTask("WinoGrande", ("winogrande",), 1267,
              (PROMPTS, "the end of the sentence is scored after either name, not the name")),
    PaperTask("ARC-E", ("opus_arc_easy",), 567, (PROMPTS, "questions of four options only: an inference")),
    PaperTask("ARC-C", ("opus_arc_challenge",), 295, (PROMPTS, "questions of four options only: an inference")),
    PaperTask("CommonsenseQA", ("opus_commonsense_qa",), 1221, (PROMPTS,)),
    PaperTask("WSC", ("wsc",), 104, (PROMPTS,)),
)
OOD_TASKS = (
    PaperTask("BBH", ("bbh_fewshot",), None,
              ("the paper's six subtasks are not named: all of lm-eval's are run, `parts` has each",
               "whether the paper's three shots show their reasoning is not said: here they do not"), by_part=True),
    PaperTask("RACE-M", ("opus_race_middle",), 1436, (PROMPTS, "full answers as options")),
    PaperTask("RACE-H", ("opus_race_high",), 3498, (PROMPTS, "full answers as options")),
    PaperTask("AX-b", ("opus_ax_b",), 1104, (PROMPTS,)),
    PaperTask("AX-g", ("opus_ax_g",), 356, (PROMPTS,)),
    PaperTask("StoryCloze", ("opus_storycloze_train", "opus_storycloze_eval"), 1871,
              (PROMPTS, "the validation set of 2016, published as XStoryCloze's English; the test set has as many")),
)
SUBJECTS = ("math", "physics", "chemistry", "biology", "geography", "astronomy")
SCIASSESS = ("most of its questions are on articles that may not be redistributed, and the paper's three worked "
             "examples are not published; give both with --data")
CPT_TASKS = (
    PaperTask("OlympicArena", tuple(f"opus_olympicarena_{subject}" for subject in SUBJECTS), None, (
        "validation split, the only one with public answers; which the paper used is not said",
        "problems without figures whose answer is a choice, several, true or false, or one number; its other "
        "answers need a computer algebra system or the execution of generated code")),
    *(PaperTask(f"SciAssess {field}", (f"opus_sciassess_{field}",), None,
                ("multiple-choice questions of the field",), private=SCIASSESS)
      for field in ("biology", "chemistry", "material", "medicine")),
)
SUITES = {"paper": PAPER_TASKS, "ood": OOD_TASKS, "cpt": CPT_TASKS}
