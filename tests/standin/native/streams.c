/* Streams, events, capture and graphs. Work is done at once, but may count as unfinished: see standin_set_lag. */
#include "standin.h"

typedef struct Stream {
  unsigned long last; /* operation in it, or that it waits for */
  unsigned long long capture; /* id of the capture it belongs to, or 0 */
  unsigned long operations;   /* enqueued in this capture */
  unsigned long joined;       /* of these, the ones that another stream of the capture waits for */
  struct Stream *next;
} Stream;

typedef struct {
  int recorded;
  unsigned long long capture; /* of the stream where it was recorded */
  Stream *stream;
  unsigned long operations; /* of that stream until then */
  unsigned long last;
} Event;

static Stream default_stream;
static Stream *streams = &default_stream;
static unsigned long long captures, current; /* number of captures so far; id of the open one, or 0 */
static Stream *origin;
static pthread_t capturing_thread;
static enum cudaStreamCaptureMode mode;
static int invalid;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static size_t nodes;
static int violations;

static Stream *of(cudaStream_t stream) { /* 1 and 2 are cudaStreamLegacy and cudaStreamPerThread */
  return (uintptr_t)stream <= 2 ? &default_stream : (Stream *)stream;
}

int is_capturing(cudaStream_t stream) { return current && of(stream)->capture == current; }

/* Whether the open capture forbids this thread calls that may wait for the device or affect other streams. */
int is_unsafe_here(void) {
  if (!current || thread_mode == cudaStreamCaptureModeRelaxed || mode == cudaStreamCaptureModeRelaxed) return 0;
  return mode == cudaStreamCaptureModeGlobal || pthread_equal(capturing_thread, pthread_self());
}

cudaError_t refuse(const char *call, const char *reason, const void *stream, cudaError_t code) {
  char text[160];
  snprintf(text, sizeof text, "%s: %s", call, reason);
  record("violation", text, stream);
  fprintf(stderr, "stand-in: capture violation, %s\n", text);
  violations++;
  invalid = 1;
  return code;
}

/* ---- progress: operations have numbers, and the device has done those up to `done` ---- */
enum { LONGEST_LAG = 8 };
static unsigned long issued, done;
static unsigned long issued_before[LONGEST_LAG + 1]; /* the latest steps, newest first */
static int lag;

/* At the start of a step the device has done what was issued before the step `steps` earlier; 0: all, at any time. */
EXPORT void standin_set_lag(int steps) { lag = steps < LONGEST_LAG ? steps : LONGEST_LAG; }

EXPORT void standin_step_begins(void) {
  memmove(issued_before + 1, issued_before, LONGEST_LAG * sizeof *issued_before);
  issued_before[0] = issued;
  if (issued_before[lag] > done) done = issued_before[lag];
}

static int is_done(unsigned long operation) { return !lag || operation <= done; }

static void wait_for(unsigned long operation) {
  if (operation > done) done = operation;
}

void enqueue(const char *what, cudaStream_t stream) {
  pthread_mutex_lock(&standin_lock);
  of(stream)->last = ++issued;
  pthread_mutex_unlock(&standin_lock);
  if (is_capturing(stream)) {
    nodes++;
    of(stream)->operations++;
  } else if (current && pthread_equal(capturing_thread, pthread_self())) {
    record("outside capture", what, stream); /* legal, but it runs once and is not in the graph */
  }
}

EXPORT int standin_violations(void) { return violations; }
EXPORT size_t standin_nodes(void) { return nodes; } /* of the last capture */

/* ---- streams ---- */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *created = calloc(1, sizeof(Stream));
  pthread_mutex_lock(&standin_lock);
  created->next = streams;
  streams = created;
  pthread_mutex_unlock(&standin_lock);
  record("cudaStreamCreate", "", created);
  *stream = (cudaStream_t)created;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  record("cudaStreamSynchronize", "", stream);
  if (is_capturing(stream))
    return refuse("cudaStreamSynchronize", "the stream is capturing", stream, cudaErrorStreamCaptureUnsupported);
  wait_for(of(stream)->last);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  record("cudaDeviceSynchronize", "", 0);
  if (is_unsafe_here()) return refuse("cudaDeviceSynchronize", "in a capture", 0, cudaErrorStreamCaptureUnsupported);
  wait_for(issued);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  record("cudaStreamQuery", "", stream);
  if (is_capturing(stream))
    return refuse("cudaStreamQuery", "the stream is capturing", stream, cudaErrorStreamCaptureUnsupported);
  return is_done(of(stream)->last) ? cudaSuccess : cudaErrorNotReady;
}

/* ---- events ---- */
static void record_event_call(const char *call, cudaEvent_t event, cudaStream_t stream) {
  char detail[32];
  snprintf(detail, sizeof detail, "%p", (void *)event);
  record(call, detail, stream);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  record_event_call("cudaEventRecord", event, stream);
  Stream *source = of(stream);
  *(Event *)event = (Event){1, is_capturing(stream) ? current : 0, source, source->operations, source->last};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

static cudaError_t host_reads_event(const char *call, cudaEvent_t event) {
  record_event_call(call, event, 0);
  if (current && ((Event *)event)->capture == current)
    return refuse(call, "the event was recorded in the capture", 0, cudaErrorCapturedEvent);
  if (is_unsafe_here()) return refuse(call, "in a capture", 0, cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  cudaError_t error = host_reads_event("cudaEventQuery", event);
  return error || is_done(((Event *)event)->last) ? error : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  wait_for(((Event *)event)->last);
  return host_reads_event("cudaEventSynchronize", event);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { return *ms = 1, cudaSuccess; }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  record_event_call("cudaStreamWaitEvent", event, stream);
  Event *waited = (Event *)event;
  Stream *waiting = of(stream);
  if (!waited->recorded) return cudaSuccess;
  if (waiting->last < waited->last) waiting->last = waited->last;
  if (current && waited->capture == current) {
    if (waiting == &default_stream)
      return refuse("cudaStreamWaitEvent", "the default stream waits for a capture", stream,
                    cudaErrorStreamCaptureImplicit);
    if (waiting->capture != current) { /* it joins the capture */
      waiting->capture = current;
      waiting->operations = waiting->joined = 0;
    }
    waiting->operations++;
    if (waited->stream != waiting && waited->operations > waited->stream->joined)
      waited->stream->joined = waited->operations;
  } else if (is_capturing(stream)) {
    return refuse("cudaStreamWaitEvent", "a capturing stream waits for an event from outside", stream,
                  cudaErrorStreamCaptureIsolation);
  }
  return cudaSuccess;
}

/* ---- capture ---- */
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = !is_capturing(stream) ? cudaStreamCaptureStatusNone
            : invalid             ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = is_capturing(stream) ? current : 0;
  if (graph) *graph = (cudaGraph_t)&nodes;
  if (dependencies) *dependencies = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *exchanged) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *exchanged;
  *exchanged = before;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode requested) {
  record("cudaStreamBeginCapture", "", stream);
  if (of(stream) == &default_stream)
    return refuse("cudaStreamBeginCapture", "the default stream", stream, cudaErrorStreamCaptureUnsupported);
  if (current) return refuse("cudaStreamBeginCapture", "another is open", stream, cudaErrorIllegalState);
  current = ++captures;
  mode = requested;
  capturing_thread = pthread_self();
  origin = of(stream);
  origin->capture = current;
  origin->operations = 0;
  nodes = 0;
  invalid = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  record("cudaStreamEndCapture", "", stream);
  *graph = 0;
  if (of(stream) != origin || !current)
    return refuse("cudaStreamEndCapture", "no capture began in this stream", stream, cudaErrorIllegalState);
  cudaError_t result = invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  for (Stream *other = streams; other && !result; other = other->next)
    if (other->capture == current && other != origin && other->joined < other->operations)
      result = refuse("cudaStreamEndCapture", "a stream of the capture was not joined", other,
                      cudaErrorStreamCaptureUnjoined);
  current = 0; /* which ends it in every stream that joined */
  if (!result) *graph = (cudaGraph_t)&nodes;
  return result;
}

/* ---- graphs: handles without contents ---- */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *list, size_t *count) {
  return *count = nodes, cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  return *executable = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  record("cudaGraphLaunch", "", stream);
  enqueue("graph", stream);
  return cudaSuccess;
}
