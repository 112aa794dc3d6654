/* The log of runtime calls. */
#include "standin.h"
#include <unistd.h>

pthread_mutex_t standin_lock = PTHREAD_MUTEX_INITIALIZER;

enum { LONGEST_DETAIL = 600, LONGEST_LINE = LONGEST_DETAIL + 120 };
static char *lines;
static size_t length, capacity;
static int recording;

static void name_of_thread(char name[16]) {
  if (getpid() == gettid())
    strcpy(name, "main");
  else
    pthread_getname_np(pthread_self(), name, 16); /* torch names its own, e.g. pt_autograd_0 */
}

void record(const char *call, const char *detail, const void *stream) {
  if (!recording) return;
  char thread[16] = "";
  name_of_thread(thread);
  pthread_mutex_lock(&standin_lock);
  if (length + LONGEST_LINE > capacity) {
    capacity = 2 * capacity + (1 << 20);
    lines = realloc(lines, capacity);
  }
  length += snprintf(lines + length, LONGEST_LINE, "%s|%.*s|%p|%s\n", call, LONGEST_DETAIL, detail, stream, thread);
  pthread_mutex_unlock(&standin_lock);
}

void record_size(const char *call, size_t bytes, const void *stream) {
  char detail[32];
  snprintf(detail, sizeof detail, "%zu", bytes);
  record(call, detail, stream);
}

int is_recording(void) { return recording; }

/* Opens an empty log. */
EXPORT void standin_start(void) {
  pthread_mutex_lock(&standin_lock);
  length = 0;
  recording = 1;
  pthread_mutex_unlock(&standin_lock);
}

/* Closes the log and returns its text, valid until the next one is opened. */
EXPORT const char *standin_stop(void) {
  recording = 0;
  if (lines) lines[length] = '\0';
  return length ? lines : "";
}

/* A line of the program's own, such as the start of a step. */
EXPORT void standin_mark(const char *text) { record("mark", text, 0); }
