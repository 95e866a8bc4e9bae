"""What the package asks of, and does to, a caller's modules: scan, names, snapshot, forward lock, group
offload.
"""
