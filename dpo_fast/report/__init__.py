"""The report of a run: one folder that opens in a browser without a network.

scores -> pairs -> figures -> charts (Plotly, in the page) and images (matplotlib, for the model card)
                -> data files, which the page loads as they are needed
"""
