"""What the scripts learn from, and what they leave behind.

Look before you train:  python -m data            ten problems, a correct and a wrong solution to each
                        python -m data FILE       ten pairs of any preference dataset
                        python -m data breaks     the catalogue of failures
"""
