"""The learner and what it stands on; no ray, no vllm.

tiny         a small Qwen2 with a character tokenizer, from scratch
warmstart    its supervised phase, cached
packing      ragged sequences -> dense rows, no prefix computed twice
policy       a Hugging Face causal LM: packed tokens in, log-probabilities out
batch        scored groups -> flat token arrays, and back to arrays per response
ranks        several processes that share a batch and remain one learner
optimizer    AdamW on float32 masters, with a guard against non-finite gradients
surrogate    objective, correction and KL as one loss
gradient     a mini-batch's gradient, micro-batch by micro-batch
metrics      what a step says, by catalogue name
learner      one batch in, one version on
scorer       reference log-probabilities
sampling     responses from the learner's own model
audit        the stale, corrected gradient against fresh on-policy ones
checkpoint   everything a learner is, written whole or not at all
export       a checkpoint's model alone
"""
