"""Everything the scripts learn from: the embedded task, the exact checker, one door to public data.

Look before you train:  python -m data            ten problems, a right and a wrong solution each
                        python -m data FILE       ten pairs of any preference dataset
"""
