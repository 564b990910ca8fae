"""The first hour on a GPU: correctness, peers and the open questions of tuning, in the order of their worth.

`steps` declares what is asked, `plan` runs it, `verdict` writes what was found, `child` is the process of one step.
"""
