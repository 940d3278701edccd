"""Hugging Face's Trainer and LoRA with forward passes only; the log is the trained adapters."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments

from hosfl.optim import ZONormalizedSGD, rebuild
from hosfl.optim.hf import ZOTrainer

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
backbone = LlamaForSequenceClassification(LlamaConfig(vocab_size=16, num_labels=2, pad_token_id=0, **sizes))
model = get_peft_model(backbone, LoraConfig("SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
base = copy.deepcopy(model)
tokens = torch.randint(1, 16, (768, 8))
data = [{"input_ids": t, "labels": int(3 in t)} for t in tokens]  # does token 3 occur?

optimizer = ZONormalizedSGD(model.named_parameters(), lr=0.04, directions=4)
arguments = TrainingArguments("run", max_steps=150, per_device_train_batch_size=64, report_to="none", disable_tqdm=True)
ZOTrainer(model, arguments, train_dataset=data[:512], optimizers=(optimizer, None)).train()
optimizer.log.save("run.log")
rebuild(base, "run.log")
answers = base(tokens[512:]).logits.argmax(1)
right = sum(int(a) == row["labels"] for a, row in zip(answers, data[512:], strict=True))
print(f"the model that the log makes answers {right} of 256 new sequences rightly")
