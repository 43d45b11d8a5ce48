"""A student that is trained as it will be quantized: rounded in the forward pass where an INT8 file has its Q/DQ pairs.

The INT8 file of the student as it is, its ranges found on images, is the plan: `prepare_student` walks that graph in
torch, with the float weights of the fp32 file that it was made from. So every rounding, every activation function that
the quantizer dropped because a range does the same, every layer that a profile leaves float is where the file has it.

Weights are learned, and of each range of an activation its scale; zero points stay, and so does the side on which a
range is cut. A batch norm that the export folded into a convolution is there again while training, with the statistics
of the batch, and folded in the forward pass. Without it a step of SGD that the student was trained with destroys it:
of a depthwise-separable network the largest eigenvalue of the loss' Hessian is 9 with its batch norms, 276 with their
statistics frozen, and 2,758 with their factors in the weights. Dropout and the like are gone, as in the file.
"""

from kdcompress.fake_quant._student import count_fixed_norms, learned_model, learned_ranges, prepare_student

__all__ = ["count_fixed_norms", "learned_model", "learned_ranges", "prepare_student"]
