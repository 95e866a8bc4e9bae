"""Which way computes a call: a cost model, measured tables where they exist, and the choice between them.
Nothing here needs a GPU.
"""
