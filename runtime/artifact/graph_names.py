"""Names, types and shapes of what a graph takes and gives, and names of files: the contract of every artifact."""

PLAN_SUFFIXES = (".plan", ".engine")  # of a TensorRT plan

# Graph inputs and outputs.  Hugging Face's names, so exported folders load in its pipelines.
PIXELS = "pixel_values"  # float32 [batch, 3, H, W] in [0, 1]
LOGITS = "logits"  # float32 [batch, classes]
HALT_PROB = "halt_prob"  # float32 [batch]
STEPS_USED = "steps_used"  # int64 [batch]
STEPS = "steps"  # int64 scalar, input of `loop`
HALT_THRESHOLD = "halt_threshold"  # float32 scalar, input of `loop`
STEP_LOGITS = "step_logits"  # float32 [steps, batch, classes], optional output of `unrolled`
STEP_HALT_PROB = "step_halt_prob"  # float32 [steps, batch], optional output of `unrolled`

# The three graphs of `stepwise`, files of one folder, and what goes between them, in the recursion's own type
# (float32 or float16):
#   embed.onnx   pixel_values → embedded, state        step.onnx   embedded, state → state, each NAME as NAME_next
#   heads.onnx   y → logits, halt_prob
# Which tensors these are is the model's affair (`ViTRM.embedded_names`), and read off the graphs
# (vitrm.runtime.artifact.interface): the state is y [batch, 1, D], z [batch, K, D] and z_…, layer 1's projection of z.
PARTS = ("embed", "step", "heads")
ANSWER, LATENTS = "y", "z"
NEXT_SUFFIX = "_next"
