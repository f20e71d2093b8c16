"""Files and formats: adapters as PEFT reads them, 4-bit models as transformers and bitsandbytes do."""
