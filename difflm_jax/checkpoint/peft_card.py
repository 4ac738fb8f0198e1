"""The README of an adapter directory: a description, and the code that loads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from difflm_jax.checkpoint.peft_config import PEFT_VERSION


def adapter_card(base_model_name: str, diffusion_config: Mapping[str, Any], notes: str) -> str:
    settings = "\n".join(
        f"- {key}: `{json.dumps(value)}`" for key, value in sorted(diffusion_config.items()) if key != "preset"
    )
    return f"""---
base_model: {json.dumps(base_model_name)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- masked-diffusion
- difflm_jax
---

# Masked-diffusion adapter for {base_model_name}

LoRA factors and the mask token's embedding row that turn a causal language model into a masked-diffusion one. It was
trained for the settings below, which `diffusion_config.json` repeats:

{settings}

```python
import difflm_jax
lm = difflm_jax.load({json.dumps(base_model_name)}, adapter="PATH/OF/THIS/ADAPTER")
print(lm.generate("What is the capital of France?").texts[0])
```

PEFT loads the same weights; attention and decoding are then the caller's to provide:

```python
{_peft_lines(base_model_name)}
```
{notes and chr(10) + notes.strip() + chr(10)}
### Framework versions

- PEFT {PEFT_VERSION}
- JAX {jax.__version__}
"""


def _peft_lines(base_model_name: str) -> str:
    """Returns code that loads the adapter with peft. `AutoPeftModel...` cannot name a .gguf file, transformers can."""
    if not base_model_name.endswith(".gguf"):
        return (
            "from peft import AutoPeftModelForCausalLM\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH/OF/THIS/ADAPTER")'
        )
    path = Path(base_model_name)
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(str(path.parent))}, "
        f"gguf_file={json.dumps(path.name)})\n"
        'model = PeftModel.from_pretrained(base, "PATH/OF/THIS/ADAPTER")'
    )
