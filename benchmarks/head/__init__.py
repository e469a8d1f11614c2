"""What the head costs beside its bare matrix products and beside what others offer: ``make bench-head``.

inputs       what every contender is given
losses       the losses, in one place for every contender that lets the loss be written
contender    what takes part
kedge_side, products, plain, peers
             the contenders: Kedge, the floor, plain PyTorch, other libraries
timing       rounds in which every contender runs once
memory       peaks, each in a process of its own
scaling      cost and memory over tokens and vocabulary
results      the figures of a size, as written
goals        what is asked of the figures
machine, tables
             where it ran, what people read
"""
