"""Layer 5: the split model behind an OpenAI-compatible gateway, paid per request.

`engine` and `gateway` know nothing of torch or peers; `shards` decodes over the peers that hold the stages;
`payments` settles x402 on an EVM chain. Import the module that you need: nothing heavy happens here.
"""
