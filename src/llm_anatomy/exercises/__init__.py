"""Exercises with feedback: one module a chapter.

    from llm_anatomy.exercises import attention

    attention.exercises()                          # what there is: level, minutes, title
    attention.check("causal_mask", causal_mask)    # judges what the answer does, names the mistake
    attention.hint("causal_mask", 1)               # a nudge; 2 nearly gives it away
    attention.solution("causal_mask")              # the worked solution, and why

None of them raises for a mistake of the learner: they print plain text.
"""
