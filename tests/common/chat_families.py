"""Families of models: a short chat template with the family's marks, and what the family writes when it calls a tool."""

# ruff: noqa: RUF001 - DeepSeek and Step3 write their tags with full-width bars

from __future__ import annotations

from typing import NamedTuple

THINK = ("<think>", "</think>")
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
HY = ("<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>", "<tool_sep>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")  # fmt: skip
KIMI = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)  # fmt: skip

HYBRID = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
OPENS = "<think>\n"
OPENS_UNLESS_OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
OFF_UNLESS_ON = "{% if enable_thinking is defined and enable_thinking is true %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"

JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
GLM_CALL = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"


def template(call: str = "", start: str = "", head: str = "<|im_start|>assistant\n", marks: str = "") -> str:
    """Return a template that shows tools if there is a format for a ``call``, and ends prompts with ``start``."""
    tools = (
        f"{{% if tools %}}{{{{ tools | tojson }}}} Write: {{% raw %}}{call}{{% endraw %}}{{% endif %}}" if call else ""
    )
    turns = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    return f"{tools}{{# {marks} #}}{turns}{{% if add_generation_prompt %}}{head}{start}{{% endif %}}"


class Family(NamedTuple):
    """A model and what it writes. ``output`` is a call of weather(city="Rome"), after "I look." as reasoning."""

    name: str
    architecture: str
    template: str
    tool: str | None = None
    reasoning: str | None = None
    tokens: tuple[str, ...] = ()
    output: str = ""


FAMILIES = (
    Family("Qwen2.5", "Qwen2ForCausalLM", template(JSON_CALL), "hermes", None, (), JSON_CALL),
    Family("Hermes 3", "LlamaForCausalLM", template(JSON_CALL), "hermes", None, (), JSON_CALL),
    Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        template(JSON_CALL, HYBRID),
        "hermes",
        "qwen3",
        THINK,
        f"<think>\nI look.\n</think>\n\n{JSON_CALL}",
    ),
    Family(
        "Qwen3 MoE",
        "Qwen3MoeForCausalLM",
        template(JSON_CALL, HYBRID),
        "hermes",
        "qwen3",
        THINK,
        f"<think>\nI look.\n</think>\n\n{JSON_CALL}",
    ),
    Family("Qwen3 Instruct 2507", "Qwen3MoeForCausalLM", template(JSON_CALL), "hermes", None, THINK, JSON_CALL),
    Family(
        "Qwen3 Thinking 2507",
        "Qwen3MoeForCausalLM",
        template(JSON_CALL, OPENS, marks="</think>"),
        "hermes",
        "qwen3",
        THINK,
        f"I look.\n</think>\n\n{JSON_CALL}",
    ),
    Family("Qwen3-Next Instruct", "Qwen3NextForCausalLM", template(JSON_CALL), "hermes", None, THINK, JSON_CALL),
    Family(
        "Qwen3-VL Instruct", "Qwen3VLForConditionalGeneration", template(JSON_CALL), "hermes", None, THINK, JSON_CALL
    ),
    Family(
        "Qwen3-VL Thinking",
        "Qwen3VLMoeForConditionalGeneration",
        template(JSON_CALL, OPENS, marks="</think>"),
        "hermes",
        "qwen3",
        THINK,
        f"I look.\n</think>\n\n{JSON_CALL}",
    ),
    Family("Qwen3-Coder", "Qwen3MoeForCausalLM", template(XML_CALL), "qwen3_coder", None, THINK, XML_CALL),
    Family(
        "Qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        template(XML_CALL, OPENS_UNLESS_OFF),
        "qwen3_coder",
        "qwen3",
        THINK,
        f"I look.\n</think>\n\n{XML_CALL}",
    ),
    Family(
        "Qwen3.5, thinking off by default",
        "Qwen3_5ForConditionalGeneration",
        template(XML_CALL, OFF_UNLESS_ON),
        "qwen3_coder",
        None,
        THINK,
        XML_CALL,
    ),
    Family(
        "QwQ",
        "Qwen2ForCausalLM",
        template(JSON_CALL, OPENS),
        "hermes",
        "deepseek_r1",
        THINK,
        f"I look.\n</think>\n\n{JSON_CALL}",
    ),
    Family(
        "DeepSeek-R1 distilled into Qwen",
        "Qwen2ForCausalLM",
        template(head="<｜Assistant｜>", start=OPENS, marks="'</think>' in content"),
        None,
        "deepseek_r1",
        THINK,
        "I look.\n</think>\n\nSunny.",
    ),
    Family(
        "DeepSeek-R1 distilled into Llama, first template",
        "LlamaForCausalLM",
        template(head="<｜Assistant｜>", marks="'</think>' in content"),
        None,
        "deepseek_r1",
        THINK,
        "<think>\nI look.\n</think>\n\nSunny.",
    ),
    Family(
        "DeepSeek-R1 with tools",
        "DeepseekV3ForCausalLM",
        template("<｜tool▁calls▁begin｜>```json", OPENS, head="<｜Assistant｜>", marks="</think>"),
        "deepseek_v3",
        "deepseek_r1",
        THINK + DEEPSEEK,
        'I look.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        template(head="<｜Assistant｜>", marks="<｜tool▁calls▁begin｜>```json"),
        None,
        None,
        DEEPSEEK,
    ),
    Family(
        "DeepSeek-V3.1 with vLLM's template",
        "DeepseekV3ForCausalLM",
        template(
            "<｜tool▁calls▁begin｜>",
            "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% if thinking %}<think>{% else %}</think>{% endif %}",
            head="<｜Assistant｜>",
        ),
        "deepseek_v31",
        "deepseek_v3",
        THINK + DEEPSEEK,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    Family(
        "DeepSeek-V3.2",
        "DeepseekV32ForCausalLM",
        "",
        "deepseek_v32",
        "deepseek_v3",
        (*THINK, "｜DSML｜"),
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    ),
    Family(
        "DeepSeek-V4",
        "DeepseekV4ForCausalLM",
        "",
        "deepseek_v4",
        "deepseek_v4",
        (*THINK, "｜DSML｜"),
        'I look.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    ),
    Family("gpt-oss", "GptOssForCausalLM", "", "openai", "openai_gptoss"),
    Family(
        "Llama 3.1",
        "LlamaForCausalLM",
        template('{"name": …, "parameters": …}', marks="ipython"),
        "llama3_json",
        None,
        ("<|python_tag|>",),
        '{"name": "weather", "parameters": {"city": "Rome"}}',
    ),
    Family(
        "Llama 3.1, with another tokenizer",
        "LlamaForCausalLM",
        template('{"name": …, "parameters": …}', marks="ipython"),
        None,
        None,
        ("<|eot|>",),
    ),
    Family(
        "Llama 3.2 with Python calls",
        "LlamaForCausalLM",
        template("[func_name1(a=1)]"),
        "pythonic",
        None,
        (),
        "[weather(city='Rome')]",
    ),
    Family("Llama 3 without tools", "LlamaForCausalLM", template(), None, None, ()),
    Family(
        "Llama 4 with Python calls",
        "Llama4ForConditionalGeneration",
        template("[func_name1(a=1)]"),
        "llama4_pythonic",
        None,
        (),
        "[weather(city='Rome')]",
    ),
    Family(
        "Llama 4",
        "Llama4ForConditionalGeneration",
        template('{"name": …, "parameters": …}'),
        "llama4_json",
        None,
        ("<|python_tag|>",),
        '{"name": "weather", "parameters": {"city": "Rome"}}',
    ),
    Family(
        "Mistral",
        "MistralForCausalLM",
        template("[TOOL_CALLS]", head=""),
        "mistral",
        None,
        ("[TOOL_CALLS]",),
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "Mistral with its own tokenizer",
        "MistralForCausalLM",
        "",
        "mistral",
        None,
        ("[TOOL_CALLS]",),
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "Magistral",
        "MistralForCausalLM",
        "[SYSTEM_PROMPT]First think: [THINK]…[/THINK][/SYSTEM_PROMPT]" + template("[TOOL_CALLS]", head=""),
        "mistral",
        "mistral",
        ("[TOOL_CALLS]", "[THINK]", "[/THINK]"),
        '[THINK]I look.[/THINK][TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "Mistral, thinking on request",
        "Mistral3ForConditionalGeneration",
        template("[TOOL_CALLS]", head="", marks="[THINK]"),
        "mistral",
        None,
        ("[TOOL_CALLS]", "[THINK]", "[/THINK]"),
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "GLM-4.5",
        "Glm4MoeForCausalLM",
        template(
            GLM_CALL,
            "{{ '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}",
            head="<|assistant|>",
        ),
        "glm45",
        "glm45",
        THINK,
        f"\n<think>I look.</think>\n{GLM_CALL}",
    ),
    Family(
        "GLM-5",
        "GlmMoeDsaForCausalLM",
        template(
            GLM_CALL,
            "{{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}",
            head="<|assistant|>",
        ),
        "glm47",
        "glm45",
        THINK,
        f"I look.</think>{GLM_CALL}",
    ),
    Family(
        "Kimi K2 Instruct",
        "DeepseekV3ForCausalLM",
        template("<|im_system|>tool_declare<|im_middle|>"),
        "kimi_k2",
        None,
        KIMI,
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    Family(
        "Kimi K2 Thinking",
        "DeepseekV3ForCausalLM",
        template("<|tool_calls_section_begin|>", head="<|im_assistant|>assistant<|im_middle|>", marks="<think>"),
        "kimi_k2",
        "kimi_k2",
        KIMI + THINK,
        '<think>I look.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    Family(
        "MiniMax-M2",
        "MiniMaxM2ForCausalLM",
        template("<minimax:tool_call>", OPENS, marks="</think>"),
        "minimax_m2",
        "minimax_m2",
        THINK,
        'I look.\n</think>\n\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    Family("Granite 4", "GraniteMoeHybridForCausalLM", template(JSON_CALL), "granite4", None, (), JSON_CALL),
    Family(
        "Granite 3",
        "GraniteForCausalLM",
        template("<|tool_call|>"),
        "granite",
        None,
        ("<|tool_call|>",),
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "Nemotron 3",
        "NemotronHForCausalLM",
        template(XML_CALL, OPENS_UNLESS_OFF),
        "qwen3_coder",
        "nemotron_v3",
        THINK,
        f"I look.\n</think>\n\n{XML_CALL}",
    ),
    Family("Nemotron Nano 2", "NemotronHForCausalLM", template("<TOOLCALL>[]</TOOLCALL>"), None, None, ()),
    Family("Gemma 3", "Gemma3ForConditionalGeneration", template(), None, None, ()),
    Family(
        "Gemma 4",
        "Gemma4ForConditionalGeneration",
        template("<|tool_call>", marks="<|channel>"),
        "gemma4",
        "gemma4",
        ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>'),
        '<|channel>thought\nI look.<channel|><|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>',
    ),
    Family(
        "Seed-OSS",
        "SeedOssForCausalLM",
        template("<seed:tool_call>\n<function=f>", marks="<seed:think></seed:think>"),
        "seed_oss",
        "seed_oss",
        ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
        "<seed:think>I look.</seed:think><seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n</function>\n</seed:tool_call>",
    ),
    Family(
        "Ernie 4.5 Thinking",
        "Ernie4_5_MoeForCausalLM",
        template(JSON_CALL, OPENS, marks="</think>"),
        "ernie45",
        "ernie45",
        (*THINK, "<tool_call>", "</tool_call>"),
        f"I look.\n</think>\n\n{JSON_CALL}",
    ),
    Family(
        "Step 3.5",
        "Step3p5ForCausalLM",
        template(XML_CALL, OPENS, marks="</think>"),
        "step3p5",
        "step3p5",
        THINK,
        f"I look.\n</think>\n{XML_CALL}",
    ),
    Family(
        "Hunyuan A13B",
        "HunYuanMoEV1ForCausalLM",
        template('<tool_calls>[{"name": …}]</tool_calls>', HYBRID, marks="<think><answer>"),
        "hunyuan_a13b",
        "hunyuan_a13b",
        (),
        '<think>\nI look.\n</think>\n<answer>\n<tool_calls>[{"name": "weather", "arguments": {"city": "Rome"}}]</tool_calls>\n</answer>',
    ),
    Family(
        "Hunyuan 3",
        "HYV3ForCausalLM",
        template("<tool_calls><arg_key>", OPENS_UNLESS_OFF),
        "hy_v3",
        "hy_v3",
        THINK + HY,
        "<tool_calls>\n<tool_call>weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>\n</tool_calls>",
    ),
    Family(
        "InternLM with vLLM's template",
        "InternLM2ForCausalLM",
        template("<|action_start|><|plugin|>"),
        "internlm",
        None,
        (),
        '<|action_start|><|plugin|>{"name": "weather", "parameters": {"city": "Rome"}}<|action_end|>',
    ),
    Family("Phi-4-mini", "Phi3ForCausalLM", template(marks="<|tool|>"), None, None, ()),
    Family(
        "Olmo 3 Instruct",
        "Olmo3ForCausalLM",
        template("<function_calls>"),
        "olmo3",
        None,
        (),
        "<function_calls>weather(city='Rome')</function_calls>",
    ),
    Family(
        "xLAM",
        "LlamaForCausalLM",
        template("[]", marks="Salesforce xLAM"),
        "xlam",
        None,
        (),
        '[{"name": "weather", "arguments": {"city": "Rome"}}]',
    ),
    Family(
        "Jamba",
        "JambaForCausalLM",
        template("<tool_calls>"),
        "jamba",
        None,
        ("<tool_calls>", "</tool_calls>"),
        '<tool_calls>[{"name": "weather", "arguments": {"city": "Rome"}}]</tool_calls>',
    ),
    Family("Command", "Cohere2ForCausalLM", template("<|START_ACTION|>"), None, None, ()),
    Family(
        "LFM2",
        "Lfm2ForCausalLM",
        template("<|tool_call_start|>"),
        "lfm2",
        None,
        ("<|tool_call_start|>", "<|tool_call_end|>"),
        "<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|>",
    ),
    Family(
        "LongCat-Flash",
        "LongcatFlashForCausalLM",
        template("<longcat_tool_call>"),
        "longcat",
        None,
        (),
        '<longcat_tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</longcat_tool_call>',
    ),
    Family(
        "MiMo-V2-Flash",
        "MiMoV2FlashForCausalLM",
        template(XML_CALL, OPENS_UNLESS_OFF),
        "qwen3_xml",
        "qwen3",
        THINK,
        f"I look.\n</think>\n{XML_CALL}",
    ),
    Family(
        "dots3",
        "Dots3NoteForCausalLM",
        template("<dots_function_call>"),
        "dots",
        None,
        (),
        "<dots_function_call>\n<invoke name=weather>\n<parameter name=city>Rome</parameter>\n</invoke>\n</dots_function_call>",
    ),
    Family(
        "a template that raises an error",
        "Qwen3ForCausalLM",
        "{{ raise_exception('no') }}" + template(JSON_CALL, HYBRID),
        None,
        None,
        THINK,
    ),
    Family(
        "thinks, but its tokenizer has no <think>",
        "Qwen2ForCausalLM",
        template(start=OPENS),
        None,
        None,
        ("<|im_end|>",),
    ),
)
