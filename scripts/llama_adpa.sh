#!/usr/bin/env bash
# Llama-3.1-8B teaches Llama-3.2-1B by ADPA+, the nine stages one by one, for a cluster's queue: scripts/llama_adpa.sh
# Explained in docs/llama.md. A stage that is done is not run again. Not run on GPUs so far (docs/scaling.md).
# shellcheck disable=SC2086  # the variables are words of a command line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FSDP="accelerate launch --config_file accelerate_config/fsdp_4gpu.yaml"
MEMORY="++model.activation_checkpointing=true ++model.gradient_accumulation_steps=8 save_every=100"
SIZE="++model.tokenizer_name_or_path=meta-llama/Llama-3.2-1B $MEMORY"
TEACHER="model=llama ++model.name_or_path=meta-llama/Llama-3.1-8B"
STUDENT="model=llama ++model.name_or_path=meta-llama/Llama-3.2-1B"

# 1 teacher SFT, 2 teacher DPO, 3 student SFT
$FSDP launch.py loss=sft $TEACHER $SIZE datasets=[deita] exp_name=teacher_sft lr=2e-5 n_epochs=3
$FSDP launch.py loss=dpo $TEACHER $SIZE datasets=[dpo_mix] exp_name=teacher_dpo lr=5e-7 loss.beta=0.01 \
    ++model.load_from=outputs/teacher_sft/FINAL
$FSDP launch.py loss=sft $STUDENT $SIZE datasets=[deita] exp_name=student_sft lr=2e-5 n_epochs=3

# 4 what the aligned teacher thinks of both responses, 5 DCKD
python launch.py task=cache $TEACHER $SIZE datasets=[dpo_mix] exp_name=cache_logprobs cache.top_k=50 \
    ++model.load_from=outputs/teacher_dpo/FINAL
$FSDP launch.py loss=dckd $STUDENT $SIZE datasets=[dpo_mix] exp_name=dckd lr=1e-5 \
    ++model.load_from=outputs/student_sft/FINAL loss.teacher_cache=outputs/cache_logprobs/CACHE

# 6 the student answers, 7 two teachers on its answers, 8 ADPA+
python launch.py task=generate $STUDENT $SIZE datasets=[dpo_mix] exp_name=generate generation.max_new_tokens=512 \
    ++model.load_from=outputs/dckd/FINAL
python launch.py task=cache $TEACHER $SIZE datasets=[dpo_mix] exp_name=cache_advantages \
    cache.generations=outputs/generate/generations.jsonl ++model.load_from=outputs/teacher_dpo/FINAL \
    cache.reference=outputs/teacher_sft/FINAL
$FSDP launch.py loss=adpa $STUDENT $SIZE datasets=[dpo_mix] exp_name=adpa_plus lr=5e-7 \
    ++model.load_from=outputs/dckd/FINAL loss.generations=outputs/generate/generations.jsonl \
    loss.advantages=outputs/cache_advantages/CACHE loss.gamma=1.5

# 9 before and after
python launch.py task=evaluate $STUDENT $SIZE datasets=[dpo_mix] exp_name=evaluate \
    evaluation.reward_accuracy=true evaluation.temperatures=[] \
    ++evaluation.models.student_sft=outputs/student_sft/FINAL \
    ++evaluation.models.adpa_plus=outputs/adpa_plus/FINAL \
    ++evaluation.reference.adpa_plus=outputs/student_sft/FINAL
