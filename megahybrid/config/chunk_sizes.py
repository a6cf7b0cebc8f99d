"""How much a run works on at a time. The code that does so and the estimate of its memory read the
same numbers."""

# The loss holds its logits' derivative for a chunk of tokens, about this many bytes, and in lower
# precision the fp32 logits of one of LOSS_PARTS parts of it. The head's fp32 gradient is read and
# written once a chunk, which must take less than the product that it ends: on a GPU that is some
# 700 tokens. 2,048 tokens of 131,072 words keep the whole loss of 2,048 features under 2 GB.
LOSS_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
LOSS_PARTS = 8
# The MLP of a layer that runs it in chunks sees this many tokens at a time: enough for products to
# run at their best, and the weights' gradients are read and written once a chunk.
CHUNK_TOKENS = 8192
# Elements of a piece of an off-loaded moment, and how many are on the device at a time: one is
# updated while another arrives and a third leaves.
OFFLOAD_PIECE, OFFLOAD_ROOMS = 2**25, 3
