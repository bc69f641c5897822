// The Chinese side of the documentation: the texts of the document by their English ones, and Swagger UI's own labels.
// Names of fields, codes and the schemas stay as they are in requests.

const CHINESE = {
  "Embed texts": "生成向量",
  "Rank documents for a query": "按查询重排文档",
  "Rank documents (Cohere)": "重排文档（Cohere）",
  "Rank documents (Jina, Infinity, text-embeddings-inference)": "重排文档（Jina、Infinity、text-embeddings-inference）",
  "Label texts": "文本分类",
  "Label texts (vLLM, Infinity)": "文本分类（vLLM、Infinity）",
  "Label texts or pairs (text-embeddings-inference)": "文本或文本对分类（text-embeddings-inference）",
  "Score pairs of texts": "为文本对打分",
  "Score pairs of texts (vLLM)": "为文本对打分（vLLM）",
  "List the models": "列出模型",
  "Show a model": "查看模型",
  "Follow the events": "订阅事件",
  "Evict a model": "驱逐模型",
  "Show the traffic of the last minute": "最近一分钟的流量",
  "List the slots": "列出各设备上的模型状态",
  "Show the memory of the devices": "查看设备内存",
  "Plan a load": "预演一次加载",
  "Load a model": "加载模型",
  "Restart a host": "重启主机",
  "Reload the registry": "重新读取注册表",
  "Show the slots of a model": "查看模型在各设备上的状态",
  "Liveness probe": "存活探针",
  "Readiness probe": "就绪探针",
  "Scrape the metrics": "抓取指标",
  "Embed texts (text-embeddings-inference)": "生成向量（text-embeddings-inference）",
  "Show the default model (text-embeddings-inference)": "查看默认模型（text-embeddings-inference）",
  "Embed texts (Cohere)": "生成向量（Cohere）",
  "Embed texts (Ollama)": "生成向量（Ollama）",
  "List the models in memory (Ollama)": "列出内存中的模型（Ollama）",
  "List the models (Ollama)": "列出模型（Ollama）",
  "Embed texts with the model of the path": "用路径中的模型生成向量",
  "Compute vectors of texts.": "计算文本的向量。",
  "The APIs of other embedding servers; `SKINS` selects them.": "其他向量服务器的接口，由 `SKINS` 选择。",
  "The models in the registry.": "注册表中的模型。",
  "Models in memory and operator commands; needs a key with the scope `admin`.": "内存中的模型与运维操作；需要具有 `admin` 权限的密钥。",
  "Probes; no key needed.": "探针，无须密钥。",
};

const CHINESE_INTRODUCTION = "兼容 OpenAI 接口的多模型向量服务。所有错误格式相同，每个响应都带 `x-request-id`。429 与 503 响应用 " +
  "`Retry-After` 和 `retry-after-ms` 说明何时重试；`x-should-retry: false` 表示重试也会失败。";

const CHINESE_LABELS = {
  Authorize: "授权", "Available authorizations": "可用的授权方式", Close: "关闭", Logout: "退出", "Try it out": "试一试", Cancel: "取消",
  Reset: "重置", Execute: "执行", Clear: "清除", Parameters: "参数", "No parameters": "无参数", "Request body": "请求体",
  Responses: "响应", Code: "状态码", Description: "说明", Links: "链接", "No links": "无链接", Schemas: "数据结构", Name: "名称",
  "Media type": "媒体类型", "Example Value": "示例", Schema: "结构", "Server response": "服务器响应", "Response body": "响应体",
  "Response headers": "响应头", "Request URL": "请求地址", Details: "详情", Download: "下载", Examples: "示例", required: "必填",
};
